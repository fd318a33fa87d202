from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import Model, Shape, export, hub_tensors
from tokenizer import stop_ids
from train import Trainer
from vqserve.format.files import check_tensors, read_tensors
from vqserve.format.geometry import Geometry
from vqserve.format.layout import parent_specs
from whole_model import load_model

SMALL = Shape(vocab_size=96, hidden=128, layers=3, q_rank=32, kv_rank=64, dense_width=96, expert_width=128, experts=8)


def randomized(shape: Shape, seed: int) -> Model:
    torch.manual_seed(seed)
    model = Model(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
        for moe in model.moes:
            moe.gate.e_score_correction_bias.normal_(std=0.3)
    return model


def test_the_training_network_is_transformers_model(tmp_path: Path, seed: int) -> None:
    model = randomized(SMALL, seed)
    export(model, tmp_path, stop_ids())
    theirs, ids = load_model(tmp_path), torch.randint(96, (2, 40))
    with torch.no_grad():
        ours, expected = model(ids)[0], theirs(input_ids=ids).logits
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()  # fp32, other order of summation


def test_the_export_is_what_the_format_expects_of_a_parent(tmp_path: Path) -> None:
    export(Model(), tmp_path, stop_ids())
    geometry = Geometry.from_dict(json.loads((tmp_path / "config.json").read_text()))
    wanted = {name: spec.shape for name, spec in parent_specs(geometry).items() if spec.required}
    assert {name: tuple(tensor.shape) for name, tensor in hub_tensors(Model()).items()} == wanted


def test_the_export_stays_small(tmp_path: Path) -> None:
    export(Model(), tmp_path, stop_ids())
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert sum(sizes) <= 29_000_000
    assert max(sizes) <= 16 << 20


def test_an_export_replaces_files_whole_and_never_writes_into_them(tmp_path: Path) -> None:
    folder, before = tmp_path / "parent", tmp_path / "before"
    folder.mkdir()
    before.mkdir()
    export(Model(SMALL), folder, [0])
    for path in folder.iterdir():
        (before / path.name).hardlink_to(path)  # the same file: what is written into one shows in the other
    contents = {path.name: path.read_bytes() for path in before.iterdir()}
    export(Model(replace(SMALL, layers=4)), folder, [1])
    assert {path.name: path.read_bytes() for path in before.iterdir()} == contents
    assert {path.name for path in folder.iterdir()} == set(contents)
    assert all((folder / name).read_bytes() != content for name, content in contents.items())


def arguments(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**({"device": "cpu", "seed": 0, "steps": 10} | changes))


def test_a_resumed_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ids, labels = (torch.randint(600, (2, 32), dtype=torch.int16) for _ in range(2))
    one = Trainer(arguments())
    one.step(ids, labels)
    one.save(tmp_path)
    two = Trainer(arguments(seed=1))
    two.resume(tmp_path)
    assert two.done == 1
    losses = [trainer.step(ids, labels)[0].item() for trainer in (one, two)]
    assert losses[0] == losses[1]
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_resuming_from_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing to resume from"):
        Trainer(arguments()).resume(tmp_path)


def test_a_step_lowers_the_loss() -> None:
    trainer = Trainer(arguments(steps=1000))
    ids = torch.randint(600, (2, 32), dtype=torch.int16)
    losses = [trainer.step(ids, ids)[0].item() for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_parent_is_whole_and_small(demo_parent: Path) -> None:
    geometry = Geometry.from_dict(json.loads((demo_parent / "config.json").read_text()))
    check_tensors(read_tensors(demo_parent), parent_specs(geometry))
    sizes = [file.stat().st_size for file in demo_parent.iterdir()]
    assert sum(sizes) <= 29_000_000
    assert max(sizes) <= 16 << 20


def test_the_encoded_model_and_all_that_git_tracks_stay_small(demo_model: Path) -> None:
    assert sum(file.stat().st_size for file in demo_model.iterdir()) <= 10_000_000
    root = Path(__file__).parents[2]
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    sizes = {name: (root / name).lstat().st_size for name in names.split("\0")[:-1]}
    assert max(sizes.values()) <= 16 << 20
    assert sum(sizes.values()) <= 42 << 20


def test_what_lies_beside_the_weights_is_what_a_training_would_write(demo_parent: Path) -> None:
    for copy, source in (("README.md", "CARD.md"), ("known_answers.json", "known_answers.json")):
        assert (demo_parent / copy).read_bytes() == (demo_parent.parent / source).read_bytes()
