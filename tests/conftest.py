"""Fixtures that every test may use."""

from __future__ import annotations

import secrets
from pathlib import Path

import hypothesis
import pytest
import torch

from random_checkpoint import make_random_checkpoint
from random_parent import make_random_parent

# Shared machines stall: a deadline would fail tests for that. Failures print how to repeat them, so no database.
hypothesis.settings.register_profile("vqserve", deadline=None, print_blob=True, database=None)
hypothesis.settings.load_profile("vqserve")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the tests' random input; fresh for each test if left out")
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/chart anew from what comes out")
    parser.addoption("--draw", action="store_true", help="load for two minutes, and write docs/monitoring/*.png anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The quick tests first, those that start a server last, each kind in its own order.

    No GPU tests without a GPU, and tests of whole systems and clusters only where `-m` asks for them.
    """
    if not torch.cuda.is_available():
        needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]
    for marker in ("system", "kube"):
        if marker not in config.option.markexpr:
            needs_more = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=needs_more)
            items[:] = [item for item in items if item not in needs_more]
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in ("e2e", "slow")])


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for random input: fresh each time, printed when the test fails, set by `--seed` to repeat a failure."""
    given: int | None = request.config.getoption("--seed")
    value = secrets.randbits(32) if given is None else given
    print(f"repeat with --seed {value}")  # noqa: T201 - pytest shows it with a failure
    return value


@pytest.fixture(scope="session")
def random_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 parent of the small model's geometry with random weights. Do not write into it."""
    return make_random_parent(tmp_path_factory.mktemp("random") / "parent")


@pytest.fixture(scope="session")
def random_checkpoint(random_parent: Path) -> Path:
    """A vqserve checkpoint of random codes, made from `random_parent`. Do not write into it."""
    folder = random_parent.parent
    return make_random_checkpoint(random_parent, folder / "checkpoint", folder / "dequantized")


@pytest.fixture(scope="session")
def dequantized_checkpoint(random_checkpoint: Path) -> Path:
    """The weights of `random_checkpoint` as an ordinary bf16 checkpoint. Do not write into it."""
    return random_checkpoint.parent / "dequantized"


@pytest.fixture(scope="session")
def demo_parent() -> Path:
    """The trained bf16 parent of the demo model."""
    return _demo("parent")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model as it is served."""
    return _demo("model")


def _demo(part: str) -> Path:
    """A folder that the repository holds: a test on it fails where it is missing."""
    return Path(__file__).parents[1] / "plugin" / "demo" / part
