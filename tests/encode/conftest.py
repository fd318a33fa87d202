"""What the encoder's tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encode.mortal import FEW_VECTORS
from encode.whole import FILE_SIZE
from random_parent import make_random_parent
from vqserve.encode import steps
from vqserve.encode.pipeline import encode


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random one."""
    folder = tmp_path_factory.mktemp("encode") / "parent"
    return make_random_parent(
        folder,
        num_hidden_layers=3,
        n_routed_experts=6,
        num_experts_per_tok=2,
        hidden_size=128,
        moe_intermediate_size=128,
    )


@pytest.fixture(scope="session")
def calibration(parent: Path) -> Path:
    path = parent.parent / "calibration.jsonl"
    texts = [" ".join(str(i * n) for i in range(2, 5 + n % 60)) for n in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks are learned as in the processes of `encode_until` and for `encoded`, whose results are compared."""
    monkeypatch.setattr(steps, "CODEBOOK_VECTORS", FEW_VECTORS)


@pytest.fixture(scope="session")
def work(encoded: Path) -> Path:
    """What `encoded` was made from."""
    return encoded.parent / "work"


@pytest.fixture(scope="session")
def encoded(parent: Path, calibration: Path) -> Path:
    """The parent encoded in one go."""
    folder = parent.parent / "encoded"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "CODEBOOK_VECTORS", FEW_VECTORS)
        encode(
            parent,
            folder,
            bits=2.0,
            calibration=calibration,
            progress=False,
            file_size=FILE_SIZE,
            work=parent.parent / "work",
        )
    return folder
