"""Every tensor has to arrive, once, in its shape; else the model is not served, and the message names the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from random_checkpoint import make_random_checkpoint
from vllm_plugin import inside
from vllm_plugin.engine_process import HAS_4_BIT_GEMM, EngineError, EngineProcess, Question
from vqserve.format.errors import TensorError
from vqserve.format.layout import TensorSpec
from vqserve.format.manifest import write_manifest
from vqserve.vllm_plugin.loading import LoadRecord

EXPERT = "model.layers.2.mlp.experts.3.up_proj.codes"
SCALES = "model.layers.1.mlp.experts.15.down_proj.scales"
CODEBOOK = "model.layers.1.mlp.experts.routed_experts.codebook_b_refinement"


@pytest.fixture
def record() -> LoadRecord:
    return LoadRecord("layer", [TensorSpec("x", "U8", (2, 3)), TensorSpec("y", "F16", (4,))])


X = torch.zeros(2, 3, dtype=torch.uint8)


def test_a_load_is_complete_when_every_tensor_has_arrived(record: LoadRecord) -> None:
    record.note("y")
    with pytest.raises(TensorError, match=r"^x: missing;"):
        record.close()


def test_a_second_load_may_bring_every_tensor_again(record: LoadRecord) -> None:
    for _ in range(2):
        record.note("x")
        record.note("y")
        record.close()
        assert record.empty


def test_the_message_counts_the_other_missing_tensors(record: LoadRecord) -> None:
    with pytest.raises(TensorError, match="x: missing, as are 1 other tensors of layer"):
        record.close()


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("z", X, "layer has no such tensor"),
        ("x", X[:1], r"expected torch.uint8\[2, 3\], found torch.uint8\[1, 3\]"),
        ("x", X.int(), r"expected torch.uint8\[2, 3\], found torch.int32\[2, 3\]"),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused_by_name(
    name: str, tensor: torch.Tensor, problem: str, record: LoadRecord
) -> None:
    with pytest.raises(TensorError, match=f"^{name}: {problem}"):
        record.check(name, tensor)


def test_a_tensor_that_belongs_is_accepted(record: LoadRecord) -> None:
    record.check("x", X)
    record.check("y", torch.zeros(4, dtype=torch.float16))


def test_a_tensor_that_comes_twice_is_refused(record: LoadRecord) -> None:
    record.note("x")
    with pytest.raises(TensorError, match="x: loaded twice"):
        record.note("x")


@pytest.mark.slow
def test_every_layer_gets_the_method_that_its_record_calls_for(engines: EngineProcess, random_checkpoint: Path) -> None:
    methods = set(engines.call(inside.load, random_checkpoint, inside.unchanged))
    of_4_bit = "AutoGPTQLinearMethod" if HAS_4_BIT_GEMM else "DequantizedLinearMethod"
    for layer in (1, 2, 3):
        assert f"model.layers.{layer}.mlp.experts.routed_experts MixedVQMoEMethod" in methods
    for module in ("0.mlp.gate_up_proj", "0.mlp.down_proj", "1.mlp.shared_experts.gate_up_proj"):
        assert f"model.layers.{module} {of_4_bit}" in methods
    for module in ("fused_qkv_a_proj", "q_b_proj", "o_proj"):
        assert f"model.layers.3.self_attn.{module} {of_4_bit}" in methods
    assert "model.layers.3.self_attn.kv_b_proj UnquantizedLinearMethod" in methods


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "names", "problem"),
    [
        (inside.without, (EXPERT,), f"TensorError: {EXPERT}: missing"),
        (inside.without, (CODEBOOK,), f"TensorError: {CODEBOOK}: missing"),
        (inside.twice, (SCALES,), f"TensorError: {SCALES}: loaded twice"),
        (inside.cut, (EXPERT,), f"TensorError: {EXPERT}: expected torch.uint8"),
        (
            inside.cut,
            (CODEBOOK,),
            f"TensorError: {CODEBOOK}: expected torch.float16[16, 8], found torch.float16[15, 8]",
        ),
        (inside.cast, (SCALES,), f"TensorError: {SCALES}: expected torch.float16"),
        (inside.copied, (EXPERT, f"{EXPERT}s"), "experts.routed_experts.w13_codess"),
    ],
)
def test_a_wrong_stream_of_tensors_is_refused_by_name(
    change: Callable[..., inside.Stream],
    names: tuple[str, ...],
    problem: str,
    engines: EngineProcess,
    random_checkpoint: Path,
) -> None:
    with pytest.raises(EngineError) as error:
        engines.call(inside.load, random_checkpoint, change, *names)
    assert problem in str(error.value).strip().rpartition("\n")[2]


@pytest.mark.slow
def test_a_layer_of_which_nothing_arrives_is_refused(engines: EngineProcess, random_checkpoint: Path) -> None:
    with pytest.raises(EngineError, match=r"layers\.2\.mlp\.experts\.0\.gate_proj\.codes: missing, as are"):
        engines.call(inside.load, random_checkpoint, inside.without_layer, "model.layers.2.mlp.experts.")


@pytest.mark.slow
def test_vllm_without_vqserve_serve_refuses_a_damaged_checkpoint_before_loading(
    engines: EngineProcess, random_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tiers = config["quantization_config"]["modules"][0]["tiers"]
    other = "c" if tiers["up_proj"][0] == "a" else "a"
    tiers["up_proj"] = other + tiers["up_proj"][1:]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_manifest(folder)
    with pytest.raises(EngineError, match=r"TensorError: .*model\.layers\.1\.mlp\.experts\.0\.up_proj\."):
        engines.call(inside.create_config, folder)


@pytest.mark.slow
def test_weights_can_be_made_up_for_a_checkpoint_that_is_only_a_configuration(
    engines: EngineProcess, random_checkpoint: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(random_checkpoint / name, tmp_path / name)
    [answer], _ = engines.ask(Question(tmp_path, prompts[:1], "bfloat16", options={"load_format": "dummy"}))
    assert answer.logits.isfinite().all()


@pytest.mark.slow
def test_weights_can_be_loaded_anew_while_serving(
    engines: EngineProcess, experts_only: Path, other_codes: Path, prompts: list[list[int]]
) -> None:
    reload = partial(inside.reload_from, other_codes, prompts[1])
    [before], reloaded = engines.ask(Question(experts_only, prompts[1:2], generate=1, inspect=reload))
    [fresh], _ = engines.ask(Question(other_codes, prompts[1:2], generate=1))
    assert torch.equal(reloaded, fresh.logits[0])
    assert not torch.equal(reloaded, before.logits[0])


@pytest.mark.slow
def test_a_reload_from_a_checkpoint_with_other_tiers_is_refused_by_name(
    engines: EngineProcess, experts_only: Path, random_parent: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    folder = make_random_checkpoint(random_parent, tmp_path / "checkpoint", spine=False, seed=1)
    reload = partial(inside.reload_from, folder, prompts[0])
    with pytest.raises(EngineError, match=r"TensorError: model\.layers\.1\.mlp\.experts\.\d+\.\w+\.\w+: "):
        engines.ask(Question(experts_only, prompts[:1], generate=1, inspect=reload))


@pytest.mark.slow
def test_a_reload_that_lacks_a_tensor_is_refused_by_name(
    engines: EngineProcess, experts_only: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    folder = shutil.copytree(experts_only, tmp_path / "checkpoint")
    inside.remove_tensor(folder, EXPERT)
    reload = partial(inside.reload_from, folder, prompts[0])
    with pytest.raises(EngineError, match=f"TensorError: {EXPERT}: missing"):
        engines.ask(Question(experts_only, prompts[:1], generate=1, inspect=reload))
