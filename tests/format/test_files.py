from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from random_checkpoint import make_random_checkpoint, read_tensors
from random_parent import make_random_parent, write_json, write_weights
from vqserve.cli import main
from vqserve.format.errors import CheckpointError, ConfigError, ManifestError, TensorError
from vqserve.format.files import INDEX, check_checkpoint
from vqserve.format.files import read_tensors as find_tensors
from vqserve.format.manifest import MANIFEST, write_manifest

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
STEM = "model.layers.1.mlp.experts"


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `random_checkpoint` to damage."""
    return shutil.copytree(random_checkpoint, tmp_path / "checkpoint")


def _refusal(folder: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as refused:
        check_checkpoint(folder)
    message = str(refused.value)
    assert message.isprintable(), "one line of a terminal"
    assert message.count(": ") >= 1
    assert "; " in message, "a remedy"
    return message


def _change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes tensors as an encoder with a defect would: index and manifest agree with the result."""
    tensors = read_tensors(folder)
    change(tensors)
    write_weights(folder, tensors, files=2)
    write_manifest(folder)


def _change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    write_json(folder / "config.json", config)
    write_manifest(folder)


def test_a_whole_checkpoint_passes_and_is_described(random_checkpoint: Path) -> None:
    checked = check_checkpoint(random_checkpoint)
    assert checked.path == random_checkpoint
    assert checked.config["model_type"] == "glm_moe_dsa"
    assert set(checked.tensors) == set(checked.specs)
    assert len(checked.quant.modules) == 3
    assert sum(record.size for record in checked.files.values()) == sum(
        path.stat().st_size for path in random_checkpoint.iterdir() if path.name != "manifest.json"
    )
    found = checked.tensors[f"{STEM}.5.down_proj.codes"]
    assert found.read() == read_tensors(random_checkpoint)[found.name].numpy().tobytes()


@pytest.mark.parametrize("spine", [True, False], ids=["spine in 4 bit", "spine as in the parent"])
def test_a_foreign_parent_s_checkpoint_passes(tmp_path: Path, spine: bool) -> None:
    parent = make_random_parent(
        tmp_path / "parent",
        num_hidden_layers=5,
        first_k_dense_replace=2,
        num_attention_heads=3,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=2,
        moe_intermediate_size=128,
        hidden_size=384,
        q_lora_rank=96,
        indexer_types=["full", "shared", "full", "full", "shared"],
        num_nextn_predict_layers=1,
    )
    folder = make_random_checkpoint(parent, tmp_path / "checkpoint", spine=spine, files=3)
    checked = check_checkpoint(folder)
    assert (checked.quant.spine is not None) == spine
    assert "model.layers.5.eh_proj.weight" in checked.tensors


def test_a_path_that_holds_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "expected a folder, found nothing" in _refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    assert "expected a folder, found a file" in _refusal(tmp_path / "file")
    assert "not a checkpoint: it holds no config.json" in _refusal(tmp_path)


def test_an_unquantized_checkpoint_is_told_to_be_encoded_first(random_parent: Path) -> None:
    message = _refusal(random_parent, ConfigError)
    assert "the checkpoint is not quantized; run `vqserve encode SRC DST`" in message


def test_another_method_and_another_model_are_refused(checkpoint: Path) -> None:
    _change_config(checkpoint, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    assert "expected 'vqserve', found 'fp8'" in _refusal(checkpoint, ConfigError)
    _change_config(checkpoint, lambda config: config.update(model_type="llama"))
    assert "expected 'glm_moe_dsa', found 'llama'" in _refusal(checkpoint, ConfigError)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"model_type": "glm_moe_dsa"', b"\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    assert "config.json: expected" in _refusal(checkpoint, ConfigError)


def test_a_flipped_bit_anywhere_is_refused(checkpoint: Path, seed: int) -> None:
    chooser = random.Random(seed)
    for path in sorted(checkpoint.iterdir()):
        if path.name == "manifest.json":
            continue
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[chooser.randrange(len(whole))] ^= 1 << chooser.randrange(8)
        path.write_bytes(damaged)
        _refusal(checkpoint)
        path.write_bytes(whole)
    check_checkpoint(checkpoint)


def test_digests_are_left_out_on_request(checkpoint: Path) -> None:
    tensor = check_checkpoint(checkpoint).tensors["lm_head.weight"]
    assert tensor.path.name == FIRST
    content = bytearray(tensor.path.read_bytes())
    content[tensor.offset] ^= 1
    (checkpoint / FIRST).write_bytes(content)
    check_checkpoint(checkpoint, digests=False)
    assert f"{FIRST}: expected sha256" in _refusal(checkpoint, ManifestError)


def test_a_truncated_and_an_empty_file_are_refused_with_both_sizes(checkpoint: Path) -> None:
    content = (checkpoint / FIRST).read_bytes()
    for kept in (len(content) - 1, 4, 0):
        (checkpoint / FIRST).write_bytes(content[:kept])
        assert f"{FIRST}: expected {len(content)} bytes, found {kept}" in _refusal(checkpoint, ManifestError)


def test_a_truncated_file_is_refused_by_its_header_even_if_the_manifest_agrees(checkpoint: Path) -> None:
    content = (checkpoint / FIRST).read_bytes()
    (checkpoint / FIRST).write_bytes(content[:-1])
    write_manifest(checkpoint)
    assert f"{FIRST}: expected {len(content)} bytes as its header says, found {len(content) - 1}" in _refusal(
        checkpoint, TensorError
    )


def test_a_missing_and_a_surplus_file_are_refused(checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin: surplus" in _refusal(checkpoint, ManifestError)
    (checkpoint / "pytorch_model.bin").unlink()
    (checkpoint / FIRST).unlink()
    assert f"{FIRST}: named by manifest.json, but is missing" in _refusal(checkpoint, ManifestError)


def test_a_surplus_safetensors_file_is_refused_even_if_the_manifest_names_it(checkpoint: Path) -> None:
    save_file({"x": torch.zeros(1)}, checkpoint / "adapter.safetensors")
    write_manifest(checkpoint)
    assert "adapter.safetensors: surplus" in _refusal(checkpoint, TensorError)


@pytest.mark.parametrize(
    "name", [f"{STEM}.3.up_proj.codes", "lm_head.weight", "model.layers.0.self_attn.indexer.k_norm.bias"]
)
def test_a_missing_tensor_is_named_with_what_it_should_be(checkpoint: Path, name: str) -> None:
    spec = check_checkpoint(checkpoint).specs[name]
    _change_tensors(checkpoint, lambda tensors: tensors.pop(name))
    message = _refusal(checkpoint, TensorError)
    assert message.startswith(f"{name}: missing")
    assert f"{spec.dtype}[{', '.join(map(str, spec.shape))}]" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.16.up_proj.codes",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.3.mlp.experts.routed_experts.codebook_b",
        "model.layers.0.self_attn.o_proj.g_idx",
        "model.layers.0.self_attn.o_proj.weight",
        "x\x1b[31m",
    ],
)
def test_a_surplus_tensor_is_named_with_its_file(checkpoint: Path, name: str) -> None:
    _change_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(256, 8, dtype=torch.uint8)}))
    message = _refusal(checkpoint, TensorError)
    assert "surplus: config.json calls for no such tensor" in message
    assert ".safetensors" in message
    assert name in message or not name.isprintable()


def test_indexer_tensors_of_a_layer_that_shares_its_indexer_are_surplus(checkpoint: Path) -> None:
    _change_config(checkpoint, lambda config: config["indexer_types"].__setitem__(2, "shared"))
    assert "model.layers.2.self_attn.indexer.wq_b is not a linear layer" in _refusal(checkpoint, ConfigError)
    listed = "model.layers.2.self_attn.indexer.wq_b"
    _change_config(checkpoint, lambda config: config["quantization_config"]["spine"]["modules"].remove(listed))
    assert "model.layers.2.self_attn.indexer." in _refusal(checkpoint, TensorError)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("0.gate_proj.codes", lambda t: t.int()),
        ("0.gate_proj.codes", lambda t: t[:-1].clone()),
        ("0.gate_proj.codes", lambda t: t.reshape(-1)),
        ("0.down_proj.codes", lambda t: t.transpose(0, 1).contiguous()),
        ("0.down_proj.scales", lambda t: t.t().contiguous()),
        ("0.up_proj.scales", lambda t: t.bfloat16()),
        ("0.up_proj.scales", lambda t: t.float()),
        ("routed_experts.codebook_a", lambda t: t.repeat(2, 1)),
        ("routed_experts.codebook_c", lambda t: t[:255].clone()),
        ("routed_experts.codebook_d_refinement", lambda t: t.repeat(16, 1)),
        ("routed_experts.codebook_d", lambda t: t.float()),
    ],
)
def test_a_wrong_dtype_or_shape_is_refused_with_both(
    checkpoint: Path, part: str, change: Callable[[Tensor], Tensor]
) -> None:
    name = f"{STEM}.{part}"
    wanted = check_checkpoint(checkpoint).specs[name]
    _change_tensors(checkpoint, lambda tensors: tensors.update({name: change(tensors[name])}))
    message = _refusal(checkpoint, TensorError)
    assert f"{name}: expected {wanted.dtype}[" in message
    assert ", found " in message


def test_tensors_kept_from_the_parent_may_have_another_float_dtype_but_no_integer_one(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.gate.weight"
    _change_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name].float()}))
    check_checkpoint(checkpoint)
    _change_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name].int()}))
    assert f"{name}: expected BF16[16, 256], found I32[16, 256]" in _refusal(checkpoint, TensorError)


def test_codebooks_that_differ_between_layers_are_refused(checkpoint: Path) -> None:
    name = "model.layers.2.mlp.experts.routed_experts.codebook_b_refinement"
    _change_tensors(checkpoint, lambda tensors: tensors[name][15, 7].mul_(2))
    assert f"{name}: expected the same codebook in every layer" in _refusal(checkpoint, TensorError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_codebook_that_is_not_finite_is_refused_with_row_and_column(checkpoint: Path, value: float) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        for layer in (1, 2, 3):
            tensors[f"model.layers.{layer}.mlp.experts.routed_experts.codebook_c"][200, 3] = value

    _change_tensors(checkpoint, poison)
    assert "codebook_c: expected finite values, found NaN or infinity at [200, 3]" in _refusal(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        (f"{STEM}.7.down_proj.scales", "[1, 255]"),
        (f"{STEM}.0.gate_proj.scales", "[255, 1]"),
        ("model.layers.0.self_attn.o_proj.scales", "[3, 255]"),
    ],
)
def test_a_scale_that_is_not_finite_is_refused_where_files_are_read_whole(
    name: str, place: str, value: float, checkpoint: Path
) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[name][0] = 2.0**127 if tensors[name].dtype == torch.bfloat16 else 65504  # finite, if only just
        tensors[name][-1, -1] = value

    _change_tensors(checkpoint, poison)
    assert f"{name}: expected finite values, found NaN or infinity at {place}" in _refusal(checkpoint, TensorError)
    check_checkpoint(checkpoint, digests=False)


@pytest.mark.parametrize("name", [FIRST, INDEX, "tokenizer.json", "manifest.json"])
def test_a_git_lfs_pointer_is_told_from_damage(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n")
    assert re.search(rf"/{name}: expected .*, found a Git LFS pointer to it; .*git lfs pull", _refusal(checkpoint))


def test_zero_points_that_are_not_symmetric_are_refused(checkpoint: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.qzeros"
    _change_tensors(checkpoint, lambda tensors: tensors[name][1, 2].add_(1))
    assert f"{name}: expected 0x77777777" in _refusal(checkpoint, TensorError)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index.pop("weight_map"), "weight_map: expected an object"),
        (lambda index: index.update(weight_map=["x"]), "weight_map: expected an object"),
        (lambda index: index["weight_map"].update(x=3), "weight_map: expected an object"),
        (lambda index: index["weight_map"].update({"lm_head.weight": "../x.safetensors"}), "expected plain file names"),
        (lambda index: index["weight_map"].update({"lm_head.weight": "/etc/passwd"}), "expected plain file names"),
        (lambda index: index["weight_map"].update({"lm_head.weight": "x.safetensors"}), "is missing"),
        (lambda index: index["weight_map"].update({"lm_head.weight": SECOND}), f"lm_head.weight: .* says {SECOND}"),
        (lambda index: index["weight_map"].pop("lm_head.weight"), "lm_head.weight: .* says nothing"),
        (lambda index: index["weight_map"].update({"x": FIRST}), "x: .* it does not"),
        (lambda index: index["weight_map"].update({"x": "config.json"}), "config.json"),
    ],
)
def test_an_index_that_disagrees_or_leaves_the_folder_is_refused(
    checkpoint: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
    change(index)
    write_json(checkpoint / INDEX, index)
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=problem):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_manifest_that_leaves_out_what_is_read_is_refused(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"][name]
    write_json(checkpoint / "manifest.json", manifest)
    assert f"{name}: surplus" in _refusal(checkpoint, ManifestError)


def test_a_tensor_in_two_files_is_refused(checkpoint: Path) -> None:
    name = next(iter(load_file(checkpoint / FIRST)))
    second = checkpoint / SECOND
    tensors = load_file(second)
    tensors[name] = load_file(checkpoint / FIRST)[name]
    save_file(tensors, second)
    write_manifest(checkpoint)
    assert f"{name}: the file holds this tensor, but {INDEX} says {FIRST}" in _refusal(checkpoint, TensorError)


def test_a_link_out_of_the_checkpoint_is_refused(checkpoint: Path) -> None:
    for name in (FIRST, "config.json"):
        (checkpoint / name).rename(checkpoint.parent / name)
        (checkpoint / name).symlink_to(checkpoint.parent / name)
        assert f"{name}: expected a file inside the folder, found a link" in _refusal(checkpoint, ManifestError)
        (checkpoint / name).unlink()
        (checkpoint.parent / name).rename(checkpoint / name)
    check_checkpoint(checkpoint)


def test_an_unquantized_checkpoint_s_tensors_are_found_too(random_parent: Path) -> None:
    found = find_tensors(random_parent)
    assert found["model.norm.weight"].shape == (256,)
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"


def _damaged(chooser: random.Random, content: bytes) -> bytes:
    """Content with up to 8 bytes overwritten, put in or left out somewhere, or cut off there."""
    length, at = chooser.choice((1, 2, 8)), chooser.randrange(len(content))
    if chooser.random() < 0.5:
        at %= 60_000  # headers are what most checks are about
    noise = chooser.choice((chooser.randbytes(length), bytes(chooser.choices(b'[]{},:"\\0-e', k=length))))
    before, after = content[:at], content[at:]
    return chooser.choice((before + noise + after[length:], before + noise + after, before + after[length:], before))


def _damages(folder: Path, chooser: random.Random, times: int) -> Iterator[Path]:
    """Damages a file of a checkpoint at a time, the manifest agreeing, and makes it whole again."""
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for _ in range(times):
        path = chooser.choice(list(whole))
        path.write_bytes(_damaged(chooser, whole[path]))
        if path.name != MANIFEST:
            write_manifest(folder)
        yield path
        for damaged in (path, folder / MANIFEST):
            damaged.write_bytes(whole[damaged])


def test_random_bytes_in_any_file_are_refused_or_harmless(checkpoint: Path, seed: int) -> None:
    for _ in _damages(checkpoint, random.Random(seed), 150):
        try:
            checked = check_checkpoint(checkpoint)
        except CheckpointError as refused:
            assert str(refused).isprintable()  # noqa: PT017 - either way is right
        else:
            for tensor in checked.tensors.values():
                tensor.read()


def test_commands_end_with_a_line_whatever_bytes_a_file_holds(
    checkpoint: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in _damages(checkpoint, random.Random(seed), 25):
        for command in (("verify",), ("inspect",), ("plan", "--memory", "4GiB")):
            code = main([command[0], str(checkpoint), *command[1:]])
            error = capsys.readouterr().err
            assert code in (0, 2), (command, path)
            assert bool(error) == (code == 2), (command, path)
            assert all(line.startswith("vqserve: error: ") for line in error.splitlines())
