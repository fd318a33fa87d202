from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vqserve
from damage import DAMAGES, Damage, change_bytes
from random_checkpoint import read_tensors
from vqserve.checkpoint.assume import SEED_MIX, assumed
from vqserve.cli import main
from vqserve.format.names import parse_expert_tensor

Capture = pytest.CaptureFixture[str]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def refused(capsys: Capture, *argv: str) -> str:
    """The one line on stderr with which it ends."""
    capsys.readouterr()
    assert main(["inspect", *argv]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    [line] = error.splitlines()
    return line


def inspected(folder: Path, tmp_path: Path) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of the real geometry; only the last of its 75 MoE layers has tiers unlike the others'."""
    geometry = Path(vqserve.__file__).parent / "data" / "glm-5.2.json"
    config = assumed(json.loads(geometry.read_text(encoding="utf-8")), SEED_MIX)
    config["quantization_config"]["modules"][-1]["tiers"]["down_proj"] = "d" * 256
    file = tmp_path_factory.mktemp("real") / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def test_every_byte_of_the_tensors_is_accounted_for(random_checkpoint: Path, tmp_path: Path) -> None:
    size = inspected(random_checkpoint, tmp_path)["bytes"]
    tensors = read_tensors(random_checkpoint)
    assert size["tensors"] == sum(tensor.nbytes for tensor in tensors.values())
    assert size["tensors"] == sum(
        sum(size[part].values()) for part in ("routed experts", "4-bit spine", "not quantized")
    )
    for part in ("codes", "refinement", "scales"):
        planes = (t.nbytes for name, t in tensors.items() if (e := parse_expert_tensor(name)) and e.part == part)
        assert size["routed experts"][part] == sum(planes)
    assert size["routed experts"]["codebooks"] == sum(t.nbytes for name, t in tensors.items() if "codebook" in name)
    assert size["4-bit spine"]["codes"] == sum(t.nbytes for name, t in tensors.items() if name.endswith("qweight"))
    assert size["not quantized"]["embeddings"] == tensors["model.embed_tokens.weight"].nbytes
    assert size["files"] == sum(f.stat().st_size for f in random_checkpoint.iterdir() if f.name != "manifest.json")


def test_tiers_and_bits_are_those_of_the_configuration(random_checkpoint: Path, tmp_path: Path) -> None:
    found = inspected(random_checkpoint, tmp_path)
    config = json.loads((random_checkpoint / "config.json").read_text(encoding="utf-8"))
    modules = config["quantization_config"]["modules"]
    assert [layer["layer"] for layer in found["layers"]] == [1, 2, 3]
    for layer, module in zip(found["layers"], modules, strict=True):
        assert layer["tiers"] == module["tiers"]
        for proj in PROJECTIONS:
            assert layer["experts"][proj] == {letter: module["tiers"][proj].count(letter) for letter in "abcd"}
    letters = "".join(text for module in modules for text in module["tiers"].values())
    bits = sum({"a": 1, "b": 1.5, "c": 2, "d": 3}[letter] for letter in letters) / len(letters)
    assert found["bits_per_expert_weight"] == pytest.approx({"without_scales": bits, "with_scales": bits + 0.125})
    planes = sum(found["bytes"]["routed experts"][part] for part in ("codes", "refinement", "scales"))
    assert planes * 8 / (len(letters) * 256 * 256) == pytest.approx(bits + 0.125)


def test_the_tables_of_a_real_model_fit_120_columns(real: Path, capsys: Capture) -> None:
    assert main(["inspect", str(real)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 120
    assert "…" not in out
    assert re.search(r"3-76 .* 69 / +0 / 151 / +36 .* 1\.871 .* 1\.996 ", out)
    assert re.search(r"77 .* 0 / +0 / +0 / 256 ", out)
    assert re.search(r"all .* 724,775,731,200 .* 100\.0% ", out)
    assert "743,377,019,904 weights" in out, "multi-token prediction is not among what has to be stored"
    assert len(lines) < 60


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_shows_three_projections_and_four_tiers(
    suffix: str, random_checkpoint: Path, tmp_path: Path
) -> None:
    picture, again = tmp_path / f"tiers{suffix}", tmp_path / f"again{suffix}"
    for file in (picture, again):
        assert main(["inspect", str(random_checkpoint), "--plot", str(file)]) == 0
    assert picture.read_bytes() == again.read_bytes()
    if suffix == ".svg":
        text = picture.read_text(encoding="utf-8")
        assert all(f"<!-- {words} -->" in text for words in (*PROJECTIONS, "a: 1 bit", "d: 3 bit", "layer"))
    else:
        with Image.open(picture) as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
        assert {(0xC6, 0xDB, 0xEF), (0x6B, 0xAE, 0xD6), (0x21, 0x71, 0xB5), (0x08, 0x30, 0x6B)} <= colours


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.sentence)
def test_a_damaged_checkpoint_is_refused_in_one_line_unless_only_reading_it_whole_would_tell(
    damage: Damage, random_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    damage.inflict(folder)
    if main(["inspect", str(folder)]) == 0:
        whole = "sha256" in damage.problem or "finite" in damage.problem or not damage.at_serve
        assert whole or "chat_template" in damage.where
        assert capsys.readouterr().err == ""
    else:
        # What a wrong digest would tell first may show as something else: a header that is no JSON.
        assert refused(capsys, str(folder)).startswith("vqserve: error: ")


def test_what_is_no_encoded_checkpoint_is_refused(random_parent: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "vqserve encode" in refused(capsys, str(random_parent))
    assert "vqserve encode" in refused(capsys, str(random_parent / "config.json"))
    assert "found nothing" in refused(capsys, str(tmp_path / "nowhere"))
    assert "it holds no config.json" in refused(capsys, str(tmp_path))
    shutil.copy(random_parent / "config.json", tmp_path / "cut.json")
    change_bytes(tmp_path, "cut.json", lambda content: content[:-3])
    assert "cut.json: " in refused(capsys, str(tmp_path / "cut.json"))


def test_results_go_neither_into_the_checkpoint_nor_nowhere(
    random_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    for option, name in (("--json", "found.json"), ("--plot", "tiers.png")):
        inside = random_checkpoint / name
        assert "would be a surplus file" in refused(capsys, str(random_checkpoint), option, str(inside))
        assert not inside.exists()
        outside = tmp_path / "nowhere" / name
        assert "there is no folder" in refused(capsys, str(random_checkpoint), option, str(outside))
    line = refused(capsys, str(random_checkpoint), "--plot", str(tmp_path / "tiers.gif"))
    assert "expected a name that ends in .png or .svg" in line


def test_without_matplotlib_the_picture_is_refused_and_the_tables_are_not(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    # Without site-packages but for what prints tables: there is no matplotlib, as without the extra.
    for name in ("rich", "vqserve"):
        found = find_spec(name)
        assert found is not None
        assert found.origin is not None
        (tmp_path / name).symlink_to(Path(found.origin).parent)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from vqserve.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-S", "-c", code, "inspect", str(random_checkpoint), *options]
        environment = {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    assert "The whole model: " in run().stdout
    done = run("--plot", str(tmp_path / "tiers.png"))
    assert done.returncode == 2
    assert done.stderr == "vqserve: error: --plot: matplotlib is not installed; install vqserve[plot]\n"
