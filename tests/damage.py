"""What can be wrong with a checkpoint, and how each is to be refused: one table for every command that checks one.

Each is done to a copy of `random_checkpoint`. What an encoder with a defect would write comes with a manifest and an
index that agree with it, so that the check meant is reached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from random_checkpoint import read_tensors
from random_parent import write_json, write_weights
from vqserve.format.files import INDEX
from vqserve.format.manifest import MANIFEST, write_manifest

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
STEM = "model.layers.1.mlp.experts"

RESTORE = "restore the (file|checkpoint) from where (it|the checkpoint) came from"
ENCODE = f"({RESTORE}, or encode it again|re-encode the parent)"


@dataclass(frozen=True)
class Damage:
    """Something wrong with a checkpoint.

    Attributes:
        sentence: What, for people.
        inflict: Does it to the checkpoint in a folder.
        where: Regular expression for the end of the place named: file, and tensor or key.
        problem: Regular expression for the beginning of what was expected and found.
        remedy: Regular expression for the beginning of the remedy.
        at_serve: Whether `vqserve serve` finds it too.
    """

    sentence: str
    inflict: Callable[[Path], object]
    where: str
    problem: str
    remedy: str
    at_serve: bool = True

    def refused_by(self, line: str) -> bool:
        """Whether a line says all that it should."""
        return re.fullmatch(f".*{self.where}: {self.problem}.*; {self.remedy}.*", line) is not None


def change_bytes(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file behind its manifest's back."""
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def change_json(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    """Changes a JSON file as a defect of its writer would: the manifest agrees."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    write_json(folder / name, content)
    if name != MANIFEST:
        write_manifest(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes tensors as an encoder with a defect would: index and manifest agree with the result."""
    tensors = read_tensors(folder)
    change(tensors)
    write_weights(folder, tensors, files=2)
    write_manifest(folder)


def set_value(folder: Path, name: str, value: float) -> None:
    """Sets the last element of a tensor."""
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


def with_nan(stream: list[tuple[str, Tensor]], name: str) -> list[tuple[str, Tensor]]:
    """Tensors on their way into a model, the last element of one of them NaN."""
    dict(stream)[name].view(-1)[-1:].fill_(torch.nan)
    return stream


def flip(at: int) -> Callable[[bytes], bytes]:
    def flipped(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[at] ^= 1
        return bytes(changed)

    return flipped


def _link_out(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def _cut_with_manifest(folder: Path) -> None:
    change_bytes(folder, FIRST, lambda content: content[:-1])
    write_manifest(folder)


def _header(folder: Path, header: bytes) -> None:
    (folder / SECOND).write_bytes(len(header).to_bytes(8, "little") + header)
    write_manifest(folder)


def _surplus_weights(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "adapter.safetensors")
    write_manifest(folder)


def _tensor_twice(folder: Path) -> None:
    tensors = load_file(folder / SECOND)
    tensors["lm_head.weight"] = load_file(folder / FIRST)["lm_head.weight"]
    save_file(tensors, folder / SECOND)
    write_manifest(folder)


def _not_finite_codebooks(folder: Path) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        for layer in (1, 2, 3):
            tensors[f"model.layers.{layer}.mlp.experts.routed_experts.codebook_c"][200, 3] = torch.nan

    change_tensors(folder, poison)


def _content(sentence: str, name: str, change: Callable[[bytes], bytes], problem: str) -> Damage:
    return Damage(sentence, partial(change_bytes, name=name, change=change), re.escape(name), problem, RESTORE)


def _whole_with(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    write_manifest(folder)


def _in_subfolder(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "pytorch_model.bin").touch()


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write_manifest(folder)


def _damaged(sentence: str, name: str, content: bytes, where: str, problem: str) -> Damage:
    return Damage(sentence[:80], partial(_whole_with, name, content), re.escape(where), problem, RESTORE)


def _missing(name: str, wanted: str) -> Damage:
    inflict = partial(change_tensors, change=lambda tensors: tensors.pop(name))
    problem = f"missing: no file holds it, expected {re.escape(wanted)}"
    return Damage(f"without {name}", inflict, re.escape(name), problem, ENCODE)


def _surplus(name: str, shown: str | None = None) -> Damage:
    inflict = partial(change_tensors, change=lambda t: t.update({name: torch.zeros(256, 8, dtype=torch.uint8)}))
    where = rf"\.safetensors: {re.escape(shown or name)}"
    return Damage(f"with {shown or name}", inflict, where, "surplus: config.json calls for no such tensor", ENCODE)


def _wrong(part: str, change: Callable[[Tensor], Tensor], wanted: str, found: str) -> Damage:
    name = f"{STEM}.{part}"
    inflict = partial(change_tensors, change=lambda tensors: tensors.update({name: change(tensors[name])}))
    problem = re.escape(f"expected {wanted}, found {found}")
    return Damage(f"{part} is {found}", inflict, rf"\.safetensors: {re.escape(name)}", problem, ENCODE)


def _not_finite(name: str, value: float, place: str, at_serve: bool) -> Damage:
    inflict = partial(set_value, name=name, value=value)
    problem = re.escape(f"expected finite values, found NaN or infinity at {place}")
    where = rf"\.safetensors: {re.escape(name)}"
    return Damage(f"{value} in {name}", inflict, where, problem, RESTORE, at_serve)


def _json(sentence: str, name: str, change: Callable[[Any], object], where: str, problem: str, remedy: str) -> Damage:
    return Damage(sentence, partial(change_json, name=name, change=change), where, problem, remedy)


def _quant(sentence: str, change: Callable[[Any], object], where: str, problem: str, remedy: str = ENCODE) -> Damage:
    return _json(sentence, "config.json", lambda c: change(c["quantization_config"]), where, problem, remedy)


def _index(sentence: str, change: Callable[[Any], object], where: str, problem: str, remedy: str = ENCODE) -> Damage:
    return _json(sentence, INDEX, change, where, problem, remedy)


def _manifest(sentence: str, change: Callable[[Any], object], where: str, problem: str, remedy: str) -> Damage:
    return _json(sentence, MANIFEST, change, where, problem, remedy)


_OUTSIDE = "do not use this checkpoint: it points outside itself"
_RELEASE = "install the vqserve release that wrote"
_LINK = "expected a file inside the folder, found a link to .*"

DAMAGES = (
    _content("a truncated file", FIRST, lambda content: content[:-1], r"expected (\d+) bytes, found \d+"),
    _content("an empty file", SECOND, lambda content: b"", r"expected \d+ bytes, found 0"),
    _content("a longer file", FIRST, lambda content: content + b"\0", r"expected \d+ bytes, found \d+"),
    _content("a flipped bit of a weight", SECOND, flip(-1), "expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"),
    _content("a flipped bit of a header", FIRST, flip(100), "expected sha256"),
    _content("a flipped bit of the tokenizer", "tokenizer.json", flip(9), "expected sha256"),
    _content("a configuration cut off", "config.json", lambda content: content[:99], "expected (JSON|.* bytes)"),
    _content(
        "a configuration that is no object",
        "config.json",
        lambda _: b"[]",
        "expected (a JSON object, found list|.* bytes)",
    ),
    _content(
        "a configuration in UTF-16",
        "config.json",
        lambda _: b"\xff\xfe{\0}\0",
        "expected (UTF-8, found byte 0xff|.* bytes)",
    ),
    _content("an empty manifest", MANIFEST, lambda _: b"", "expected JSON"),
    Damage(
        "a truncated file, manifest agreeing", _cut_with_manifest, FIRST, r"expected \d+ bytes as its header", RESTORE
    ),
    Damage(
        "a header that is no JSON",
        partial(_header, header=b"\x80\x04."),
        f"{SECOND}: header",
        "expected UTF-8",
        RESTORE,
    ),
    Damage(
        "a header that is a list", partial(_header, header=b"[]"), f"{SECOND}: header", "expected a JSON obj", RESTORE
    ),
    Damage("a missing file", lambda f: (f / FIRST).unlink(), FIRST, "named by manifest.json, but is missing", RESTORE),
    Damage("no manifest", lambda f: (f / MANIFEST).unlink(), MANIFEST, "is missing", "the checkpoint is incomplete"),
    Damage("no index", lambda f: (f / INDEX).unlink(), INDEX, "named by manifest.json, but is missing", RESTORE),
    Damage(
        "a pickle",
        lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        "pytorch_model.bin",
        "surplus",
        "remove it",
    ),
    Damage("weights that no one reads", _surplus_weights, "adapter.safetensors", "surplus: .* names no tensor", ENCODE),
    Damage("a tensor in two files", _tensor_twice, f"{SECOND}: lm_head.weight", f".* says {FIRST}", ENCODE),
    Damage("a pickle in a subfolder", _in_subfolder, "sub", "surplus", "remove it"),
    Damage("a hidden pickle", lambda f: (f / ".x.bin").touch(), r"\.x\.bin", "surplus", "remove it"),
    *(
        Damage(
            f"{name} that the manifest names", partial(_whole_with, name, b""), name, "expected a file in", "take it"
        )
        for name in ("pytorch_model.bin", "weights.pt", "x.pkl", "modeling_x.py", "zeros")
    ),
    *(
        _damaged(f"{name} is {content!r}, manifest agreeing", name, content, name, problem)
        for name, content, problem in (
            ("tokenizer.json", b"garbage", "expected JSON, found an error"),
            ("tokenizer_config.json", b"{", "expected JSON, found an error"),
            ("tokenizer_config.json", b"[" * 100_000, "expected JSON, found it nested too deeply"),
            ("generation_config.json", b"{", "expected JSON, found an error"),
            ("generation_config.json", b"[]", "expected a JSON object, found list"),
            ("chat_template.jinja", b"{% if", "expected a Jinja template, found an error"),
            ("chat_template.jinja", b"{{ x | nonsense }}", "expected a Jinja template, found an error"),
            ("chat_template.jinja", b"\xff", "expected UTF-8, found byte 0xff at 0"),
        )
    ),
    _damaged(
        "a tokenizer without tokens", "tokenizer.json", b"{}", "tokenizer.json: model.vocab", "expected the tokens"
    ),
    Damage(
        "no tokenizer, manifest agreeing",
        _without_tokenizer,
        "tokenizer.json",
        "named by the checkpoint, but is missing",
        RESTORE,
    ),
    *(
        _json(
            f"{key} {value!r} in {name}",
            name,
            partial(lambda key, value, content: content.update({key: value}), key, value),
            f"{name}: {key}",
            f"expected token ids from 0 to 639, found {found}",
            RESTORE,
        )
        for name, key, value, found in (
            ("config.json", "eos_token_id", "x", "'x'"),
            ("config.json", "eos_token_id", [0, 640], "640"),
            ("config.json", "bos_token_id", -1, "-1"),
            ("config.json", "pad_token_id", True, "True"),
            ("generation_config.json", "eos_token_id", [0.0], "0.0"),
            ("generation_config.json", "eos_token_id", {}, "{}"),
        )
    ),
    _json(
        "a token beyond the vocabulary",
        "tokenizer.json",
        lambda content: content["model"]["vocab"].update(x=640),
        "tokenizer.json: model.vocab",
        "expected token ids from 0 to 639, found 640",
        RESTORE,
    ),
    _json(
        "an added token beyond the vocabulary",
        "tokenizer.json",
        lambda content: content["added_tokens"][0].update(id="x"),
        "tokenizer.json: added_tokens",
        "expected token ids from 0 to 639, found 'x'",
        RESTORE,
    ),
    _json(
        "a temperature in words",
        "generation_config.json",
        lambda content: content.update(temperature="cold"),
        "generation_config.json: temperature",
        "expected a number, found 'cold'",
        RESTORE,
    ),
    *(
        _json(
            f"code to run in {name}",
            name,
            lambda content: content.update(auto_map={"AutoModel": "modeling_x.X"}),
            f"{name}: auto_map",
            "names Python code",
            "remove the key",
        )
        for name in ("config.json", "tokenizer_config.json")
    ),
    _missing(f"{STEM}.3.up_proj.scales", "F16[256, 2]"),
    _missing("lm_head.weight", "BF16[640, 256]"),
    _missing("model.layers.0.self_attn.indexer.k_norm.bias", "BF16[128]"),
    _missing("model.layers.2.mlp.experts.routed_experts.codebook_d", "F16[256, 4]"),
    _surplus("model.layers.1.mlp.experts.16.up_proj.codes"),
    _surplus("model.layers.1.mlp.experts.0.up_proj.weight"),
    _surplus("model.layers.3.mlp.experts.routed_experts.codebook_b"),
    _surplus("model.layers.0.self_attn.o_proj.g_idx"),
    _surplus("model.layers.0.self_attn.o_proj.weight"),
    _surplus("x\x1b[31m", r"x\x1b[31m"),
    _wrong("0.up_proj.scales", lambda t: t.bfloat16(), "F16[256, 2]", "BF16[256, 2]"),
    _wrong("0.up_proj.scales", lambda t: t.float(), "F16[256, 2]", "F32[256, 2]"),
    _wrong("0.gate_proj.scales", lambda t: t[:-1].clone(), "F16[256, 2]", "F16[255, 2]"),
    _wrong("0.gate_proj.scales", lambda t: t.reshape(-1), "F16[256, 2]", "F16[512]"),
    _wrong("0.down_proj.scales", lambda t: t.t().contiguous(), "F16[2, 256]", "F16[256, 2]"),
    _wrong("routed_experts.codebook_a", lambda t: t.repeat(2, 1), "F16[256, 8]", "F16[512, 8]"),
    _wrong("routed_experts.codebook_c", lambda t: t[:255].clone(), "F16[256, 4]", "F16[255, 4]"),
    _wrong("routed_experts.codebook_d_refinement", lambda t: t.repeat(16, 1), "F16[16, 4]", "F16[256, 4]"),
    _wrong("routed_experts.codebook_d", lambda t: t.float(), "F16[256, 4]", "F32[256, 4]"),
    Damage(
        "codebooks that differ between layers",
        partial(set_value, name="model.layers.2.mlp.experts.routed_experts.codebook_b_refinement", value=9.0),
        r"\.safetensors: model\.layers\.2\.mlp\.experts\.routed_experts\.codebook_b_refinement",
        f"expected the same codebook in every layer, found another than {STEM}.routed_experts.codebook_b_refinement",
        ENCODE,
    ),
    Damage(
        "NaN in a codebook",
        _not_finite_codebooks,
        rf"\.safetensors: {STEM}\.routed_experts\.codebook_c",
        r"expected finite values, found NaN or infinity at \[200, 3\]",
        ENCODE,
    ),
    Damage(
        "zero points that are not symmetric",
        partial(set_value, name="model.layers.2.self_attn.o_proj.qzeros", value=0x77777778),
        r"\.safetensors: model\.layers\.2\.self_attn\.o_proj\.qzeros",
        "expected 0x77777777 in every element",
        ENCODE,
    ),
    _not_finite(f"{STEM}.0.gate_proj.scales", torch.nan, "[255, 1]", at_serve=True),
    _not_finite(f"{STEM}.15.up_proj.scales", torch.inf, "[255, 1]", at_serve=True),
    _not_finite("model.layers.3.mlp.experts.7.down_proj.scales", -torch.inf, "[1, 255]", at_serve=True),
    _not_finite("model.layers.0.self_attn.o_proj.scales", torch.nan, "[3, 255]", at_serve=True),
    _not_finite("model.norm.weight", torch.inf, "[255]", at_serve=False),
    _not_finite("model.layers.2.self_attn.kv_b_proj.weight", -torch.inf, "[895, 511]", at_serve=False),
    _not_finite("model.layers.1.mlp.gate.e_score_correction_bias", torch.nan, "[15]", at_serve=False),
    _quant(
        "another format version",
        lambda q: q.update(format_version=2),
        "format_version",
        "expected 1, found 2",
        _RELEASE,
    ),
    _quant("version 1.0", lambda q: q.update(format_version=1.0), "format_version", "expected 1, found 1.0", _RELEASE),
    _quant("no version", lambda q: q.pop("format_version"), "quantization_config", "key 'format_version' is missing"),
    _quant(
        "another method", lambda q: q.update(quant_method="fp8"), "quant_method", "expected 'vqserve', found", "this is"
    ),
    _quant("an unknown key", lambda q: q.update(bits=2), "quantization_config", "unknown key 'bits'", "remove it"),
    _quant(
        "an unknown key of a module",
        lambda q: q["modules"][1].update(bits=2),
        r"modules\[1\]",
        "unknown key",
        "remove it",
    ),
    _quant("an unknown key of the spine", lambda q: q["spine"].update(x=2), "spine", "unknown key 'x'", "remove it"),
    _quant(
        "another group size", lambda q: q["modules"][0].update(group_size=64), "group_size", "expected 128, found 64"
    ),
    _quant(
        "an unknown tier",
        lambda q: q["modules"][0]["tiers"].update(up_proj="e" * 16),
        rf"{STEM}\.tiers\.up_proj",
        "expected one letter of a/b/c/d per expert, found 'eeee",
    ),
    _json(
        "another model",
        "config.json",
        lambda config: config.update(model_type="llama"),
        "model_type",
        "expected 'glm_moe_dsa', found 'llama'",
        "vqserve takes GLM-MoE-DSA",
    ),
    _index("no weight map", lambda index: index.pop("weight_map"), "weight_map", "expected an object of tensor names"),
    _index("a weight map of no names", lambda i: i["weight_map"].update(x=3), "weight_map", "expected an object"),
    _index(
        "an index that names another file",
        lambda index: index["weight_map"].update({"lm_head.weight": SECOND}),
        f"{FIRST}: lm_head.weight",
        f".* says {SECOND}",
    ),
    _index(
        "an index that leaves out a tensor",
        lambda index: index["weight_map"].pop("lm_head.weight"),
        f"{FIRST}: lm_head.weight",
        ".* says nothing",
    ),
    _index(
        "an index that names a tensor too many",
        lambda i: i["weight_map"].update(x=FIRST),
        f"{FIRST}: x",
        ".* it does not",
    ),
    _index(
        "an index that names a missing file",
        lambda index: index["weight_map"].update(x="x.safetensors"),
        "x.safetensors",
        f"named by {INDEX}, but is missing",
        RESTORE,
    ),
    _index(
        "an index that names something else",
        lambda i: i["weight_map"].update(x="config.json"),
        "config.json",
        "expected a header of at most",
        RESTORE,
    ),
    *(
        _index(
            f"an index that names {path}",
            partial(lambda path, index: index["weight_map"].update({"lm_head.weight": path}), path),
            INDEX,
            "expected plain file names inside the folder, found",
            _OUTSIDE,
        )
        for path in ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", "a\0b")
    ),
    _manifest(
        "another manifest version", lambda m: m.update(manifest_version=2), "manifest_version", "expected 1", _RELEASE
    ),
    _manifest(
        "an unknown key of the manifest", lambda m: m.update(signature=""), MANIFEST, "expected exactly", RESTORE
    ),
    _manifest("a manifest without files", lambda m: m.update(files=[]), MANIFEST, "expected exactly the keys", RESTORE),
    _manifest(
        "a manifest without a file", lambda m: m["files"].pop(INDEX), INDEX, "surplus: manifest.json", "remove it"
    ),
    _manifest(
        "a manifest with another size",
        lambda m: m["files"][FIRST].update(size=15),
        FIRST,
        "expected 15 bytes, found",
        RESTORE,
    ),
    _manifest(
        "a manifest with another digest",
        lambda m: m["files"][FIRST].update(sha256="0" * 64),
        FIRST,
        "expected sha256 0{64}, found",
        RESTORE,
    ),
    _manifest(
        "a manifest with an unknown key",
        lambda m: m["files"][FIRST].update(md5=""),
        f"{MANIFEST}: {FIRST}",
        "expected exactly the keys size and sha256",
        RESTORE,
    ),
    *(
        _manifest(
            f"a manifest that names {path}",
            partial(lambda path, m: m["files"].update({path: {"size": 0, "sha256": "0" * 64}}), path),
            MANIFEST + ": .*",
            "expected plain names of files inside the folder",
            _OUTSIDE,
        )
        for path in ("../config.json", "/etc/passwd", "sub/x.json", "..")
    ),
    *(
        Damage(
            f"{name} is a link out", partial(_link_out, name=name), re.escape(name), _LINK, "copy the checkpoint with"
        )
        for name in (FIRST, "config.json", INDEX, "tokenizer.json")
    ),
)
"""All of it. `where` and `problem` together name file, tensor or key, and what was expected."""
