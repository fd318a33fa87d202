"""What an encoder takes for a parent, and how it tells two of them apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from random_checkpoint import read_tensors
from random_parent import make_random_parent, write_weights
from vqserve.encode import parent as parent_module
from vqserve.encode.parent import Parent
from vqserve.format.errors import TensorError
from vqserve.format.names import layer_of


@pytest.fixture
def folder(random_parent: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(random_parent, tmp_path / "parent")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_place(value: float, folder: Path) -> None:
    name, tensors = "model.layers.2.mlp.experts.3.up_proj.weight", read_tensors(folder)
    tensors[name][7, 11] = value
    write_weights(folder, tensors, 2)
    parent = Parent(folder)
    with pytest.raises(TensorError, match=rf"safetensors: {name}: expected finite values, found {value} at \[7, 11\]"):
        parent.expert(2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.extra.weight",
        "model.layers.2.self_attn.o_proj.bias",
        "model.layers.4.eh_proj.weight",  # of a multi-token-prediction layer that the configuration does not have
        "model.layers.1.self_attn.indexer.wk.weight",  # of a layer that shares another's indexer
        "model.vision.weight",
    ],
)
def test_a_tensor_that_the_configuration_has_no_place_for_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kinds = ["full", "shared", "full", "full"]
    folder = make_random_parent(tmp_path / "parent", indexer_types=kinds, n_routed_experts=4)
    write_weights(folder, read_tensors(folder) | {name: torch.zeros(2, 2)}, 2)
    with pytest.raises(TensorError, match=rf"safetensors: {name}: surplus: config.json calls for no such tensor"):
        Parent(folder)


@pytest.mark.parametrize("present", [True, False])
def test_a_prediction_layer_may_be_there_or_not(present: bool, tmp_path: Path) -> None:
    folder = make_random_parent(tmp_path / "parent", num_nextn_predict_layers=1, n_routed_experts=4)
    if not present:
        tensors = {name: tensor for name, tensor in read_tensors(folder).items() if layer_of(name) != 4}
        write_weights(folder, tensors, 2)
    assert any(layer_of(name) == 4 for name in Parent(folder).tensors) == present


@pytest.mark.parametrize("limit", [2**40, 0])
def test_a_parent_is_told_by_its_content(limit: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent_module, "DIGEST_LIMIT", limit)
    path = max(folder.glob("*.safetensors"))
    before, stat = Parent(folder).fingerprint(), path.stat()
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert Parent(folder).fingerprint() != before, "same size and time, other content"


def test_a_small_parent_copied_anew_is_the_same_parent(random_parent: Path, folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert Parent(folder).fingerprint() == Parent(random_parent).fingerprint()
