from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch import Tensor

from random_checkpoint import read_tensors
from vqserve.encode.writer import claimed, write_checkpoint
from vqserve.format.files import check_checkpoint, read_config


class Interruption(Exception):
    """What ends the first attempt."""


@pytest.mark.parametrize("after", [0, 60, 400])
def test_an_interrupted_write_resumed_with_other_file_sizes_leaves_nothing_behind(
    after: int, random_parent: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    tensors, config, count = read_tensors(random_checkpoint), dict(read_config(random_checkpoint)), itertools.count()

    def interrupted(name: str) -> Tensor:
        if next(count) == after:
            raise Interruption
        return tensors[name]

    folder = tmp_path / "result"
    with pytest.raises(Interruption), claimed(folder):
        write_checkpoint(folder, random_parent, config, "card", 1 << 20, interrupted)
    with claimed(folder):
        write_checkpoint(folder, random_parent, config, "card", 3 << 20, lambda name: tensors[name])
    found = check_checkpoint(folder, digests=True)
    assert found.tensors.keys() == tensors.keys()
