"""Fixtures that every test may use."""

from __future__ import annotations

import secrets
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from random_checkpoint import make_random_checkpoint
from random_parent import make_random_parent

# Shared machines stall: a deadline would fail tests for that. Failures print how to repeat them, so no database.
hypothesis.settings.register_profile("vqserve", deadline=None, print_blob=True, database=None)
hypothesis.settings.load_profile("vqserve")


SHARING = ("tests/e2e/", "tests/vllm_plugin/")
"""Folders whose tests share processes that take long to start."""
ALONE = ("tests/e2e/test_parallel.py",)
"""Files in them that start their own."""
THREADS = torch.get_num_threads()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the tests' random input; fresh for each test if left out")
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/chart anew from what comes out")
    parser.addoption("--draw", action="store_true", help="load for two minutes, and write docs/monitoring/*.png anew")


def pytest_configure() -> None:
    """A shell has what it runs in the background ignore SIGINT, and so would all that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread, for fixtures too: those of many small operations wait for each other, on a busy machine for long.

    Beside a GPU they make its input, and nothing else runs.
    """
    torch.set_num_threads(THREADS if item.get_closest_marker("gpu") else 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The quick tests first, then those that start a server, then other slow ones, each kind in its own order.

    One of two processes takes all that start a server (`pytest_xdist_make_scheduler`), the other what follows.
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
    items.sort(key=lambda item: 1 if item.get_closest_marker("e2e") else 2 if item.get_closest_marker("slow") else 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, tests that share a server or an engine stay in one process as those of a file do."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):  # type: ignore[misc] # xdist states no types
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name in (*ALONE, *SHARING) if nodeid.startswith(name)), super()._split_scope(nodeid))

    return Together(config, log)


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
