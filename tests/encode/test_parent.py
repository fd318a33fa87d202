"""What an encoder takes for a parent, and how it tells two of them apart."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from random_checkpoint import read_tensors
from random_parent import make_random_parent, write_weights
from vqserve.cli import main
from vqserve.encode import parent as parent_module
from vqserve.encode.parent import Parent
from vqserve.format.config import PROJECTIONS
from vqserve.format.errors import CheckpointError, TensorError
from vqserve.format.files import INDEX, SINGLE, check_checkpoint
from vqserve.format.names import layer_of
from vqserve.format.variants import IMPLIED
from vqserve.model.weights import open_tokenizer


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


@pytest.mark.parametrize("limit", [2**40, 0])
def test_a_parent_copied_anew_is_the_same_parent(
    limit: int, random_parent: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_module, "DIGEST_LIMIT", limit)
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert Parent(folder).fingerprint() == Parent(random_parent).fingerprint()


def same_tensors(folder: Path, other: Path) -> bool:
    one, two = Parent(folder), Parent(other)
    return one.tensors.keys() == two.tensors.keys() and all(
        torch.equal(one.tensor(name), two.tensor(name)) for name in one.tensors
    )


def test_a_single_file_needs_no_index(random_parent: Path, folder: Path) -> None:
    tensors = read_tensors(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert same_tensors(folder, random_parent)


def test_a_buffer_that_older_exports_hold_is_passed_over(random_parent: Path, folder: Path) -> None:
    left_over = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(32) for layer in range(4)}
    write_weights(folder, read_tensors(folder) | left_over, 2)
    assert same_tensors(folder, random_parent)


@pytest.mark.parametrize("dangling", [False, True])
def test_weights_without_their_index_are_refused_by_its_name(dangling: bool, folder: Path) -> None:
    (folder / INDEX).unlink()
    if dangling:
        (folder / INDEX).symlink_to("nowhere")
    with pytest.raises(
        CheckpointError, match=rf"/{INDEX}: is missing: expected it beside 2 safetensors files .*; down"
    ):
        Parent(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=rf"/{SINGLE}: named by a checkpoint without {INDEX}, but is missing"):
        Parent(folder)


def fuse(tensors: dict[str, Tensor], layer: int) -> None:
    """Puts a layer's experts on top of each other."""
    module = f"model.layers.{layer}.mlp.experts"
    experts = [[tensors.pop(f"{module}.{e}.{proj}.weight") for proj in PROJECTIONS] for e in range(16)]
    tensors[f"{module}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
    tensors[f"{module}.down_proj"] = torch.stack([down for *_, down in experts])


@pytest.mark.parametrize("name", ["0.up_proj.weight", "15.down_proj.weight"])
def test_experts_both_fused_and_apart_are_refused_with_both_names(name: str, folder: Path) -> None:
    tensors, module = read_tensors(folder), "model.layers.2.mlp.experts"
    single = {f"{module}.{name}": tensors[f"{module}.{name}"]}
    fuse(tensors, 2)
    for order in (single | tensors, tensors | single):
        write_weights(folder, order, 2)
        with pytest.raises(TensorError, match="expected experts fused or apart, found both") as refused:
            Parent(folder)
        assert f"{module}.{name}" in str(refused.value)
        assert re.search(rf"{module}\.(gate_up|down)_proj\b", str(refused.value))


@pytest.mark.parametrize(("leaf", "expected"), [("gate_up_proj", "16, 512, 256"), ("down_proj", "16, 256, 256")])
def test_fused_experts_of_another_shape_are_refused_with_both(leaf: str, expected: str, folder: Path) -> None:
    tensors, name = read_tensors(folder), f"model.layers.2.mlp.experts.{leaf}"
    fuse(tensors, 2)
    tensors[name] = tensors[name][:-1].clone()
    write_weights(folder, tensors, 2)
    found = expected.replace("16", "15", 1)
    with pytest.raises(TensorError, match=rf"{name}: expected BF16\[{expected}\], found BF16\[{found}\]"):
        Parent(folder)


def test_experts_that_are_stored_fused_are_read_apart(random_parent: Path, folder: Path) -> None:
    tensors = read_tensors(folder)
    for layer in (1, 2, 3):
        fuse(tensors, layer)
    write_weights(folder, tensors, 2)
    assert same_tensors(folder, random_parent)
    assert main(["serve", str(folder), "--bf16", "--print"]) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
    ],
)
def test_a_git_lfs_pointer_is_told_from_damage(name: str, folder: Path) -> None:
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n")
    with pytest.raises(CheckpointError, match=rf"{name}: expected .*, found a Git LFS pointer to .*; .*git lfs pull"):
        Parent(folder)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", "[]", "the tokenizer cannot be read"),
        ("tokenizer.json", "{", "the tokenizer cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object, found list"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "the tokenizer cannot be read"),
        ("tokenizer_config.json", '{"eos_token": [1]}', "the tokenizer cannot be read"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: expected a JSON object, found list"),
    ],
)
def test_a_broken_file_of_the_tokenizer_is_refused(name: str, content: str, problem: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=problem) as refused:
        open_tokenizer(folder)
    assert str(refused.value).isprintable()


def test_a_model_in_a_hubs_cache_is_read_through_its_links(random_checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--who--what"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in random_checkpoint.iterdir():
        shutil.copyfile(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    check_checkpoint(snapshot)
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(random_checkpoint / "README.md")
    with pytest.raises(CheckpointError, match="expected a file inside the folder, found a link"):
        check_checkpoint(snapshot)


def test_what_transformers_implies_is_completed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in IMPLIED:
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert {key: Parent(folder).config[key] for key in IMPLIED} == IMPLIED
    assert main(["serve", str(folder), "--bf16", "--print"]) == 2
    assert "scoring_func: key is missing" in capsys.readouterr().err
