from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqserve.format.atomic import unfinished_name
from vqserve.format.errors import ManifestError
from vqserve.format.manifest import build_manifest, check_manifest, plain_file, read_manifest, write_manifest

GOLDEN = Path(__file__).parent.parent / "golden/format-1/manifest.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two files and their manifest."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"Hello, world!\n")
    (folder / "empty").write_bytes(b"")
    write_manifest(folder)
    return folder


def test_the_golden_manifest_is_written_and_passes(folder: Path) -> None:
    assert (folder / "manifest.json").read_bytes() == GOLDEN.read_bytes()
    assert check_manifest(folder, digests=True) == build_manifest(folder) == read_manifest(folder)
    assert {path.name for path in folder.iterdir()} == {"a.txt", "empty", "manifest.json"}


def test_what_hubs_git_and_file_systems_put_beside_a_checkpoint_is_no_part_of_it(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".git").mkdir()
    (folder / ".gitattributes").write_text("x", encoding="utf-8")
    (folder / "lost+found").mkdir()
    assert set(check_manifest(folder, digests=True)) == {"a.txt", "empty"}


@pytest.mark.parametrize("name", [".x.bin", "sub", "sub/pytorch_model.bin", ".hidden/x.safetensors", "b.txt"])
def test_what_the_manifest_does_not_name_is_refused_wherever_it_is(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    if name == "sub":
        (folder / name).mkdir()
    else:
        (folder / name).touch()
    with pytest.raises(ManifestError, match=rf"{name.partition('/')[0]}: surplus: .*; remove it from the folder"):
        check_manifest(folder, digests=False)


def test_what_an_interrupted_write_left_is_called_that(folder: Path) -> None:
    unfinished_name(folder / "a.txt").touch()
    with pytest.raises(ManifestError, match="left by a write that was interrupted; remove it"):
        check_manifest(folder, digests=False)


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


RECORD = {"size": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(manifest_version=2), "manifest_version: expected 1, found 2; install"),
        (lambda m: m.update(manifest_version=True), "expected 1, found True"),
        (lambda m: m.pop("manifest_version"), "expected 1, found None"),
        (lambda m: m.pop("files"), "exactly the keys"),
        (lambda m: m.update(signature=""), "exactly the keys"),
        (lambda m: m.update(files=[]), "exactly the keys"),
        (lambda m: m["files"].update({"../a.txt": RECORD}), r"\.\./a\.txt: expected plain names"),
        (lambda m: m["files"].update({"/etc/passwd": RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"sub/a.txt": RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"..": RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"": RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"a\0b": RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"a.txt\n": RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"x" * 300: RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"manifest.json": RECORD}), "expected plain names"),
        (lambda m: m["files"].update({"b.txt": RECORD}), "b.txt: named by manifest.json, but is missing"),
        (lambda m: m["files"].pop("empty"), "empty: surplus: manifest.json does not name it"),
        (lambda m: m["files"]["a.txt"].update(size=15), "a.txt: expected 15 bytes, found 14"),
        (lambda m: m["files"]["a.txt"].update(size="14"), "expected a size in bytes, found '14'"),
        (lambda m: m["files"]["a.txt"].update(size=-1), "expected a size in bytes"),
        (lambda m: m["files"]["a.txt"].update(sha256="0" * 64), "a.txt: expected sha256 0000"),
        (lambda m: m["files"]["a.txt"].update(sha256="0" * 63), "64 lower-case hexadecimal digits"),
        (lambda m: m["files"]["a.txt"].update(sha256=None), "64 lower-case hexadecimal digits"),
        (lambda m: m["files"]["a.txt"].update(md5=""), "exactly the keys size and sha256"),
    ],
)
def test_a_manifest_that_disagrees_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    _edit(folder, change)
    with pytest.raises(ManifestError, match=problem) as refused:
        check_manifest(folder, digests=True)
    assert str(refused.value).isprintable()


def test_a_flipped_bit_is_found_by_the_digest_only(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"Hello, world?\n")
    check_manifest(folder, digests=False)
    with pytest.raises(ManifestError, match=r"a\.txt: expected sha256 d9014c.*; restore"):
        check_manifest(folder, digests=True)


def test_a_folder_without_manifest_is_incomplete(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"manifest\.json: is missing"):
        check_manifest(folder, digests=False)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(folder: Path) -> None:
    (folder / "a.txt").rename(folder.parent / "outside")
    (folder / "a.txt").symlink_to("../outside")
    with pytest.raises(ManifestError, match=r"a\.txt: expected a file inside the folder, found a link to .*outside"):
        check_manifest(folder, digests=True)
    with pytest.raises(ManifestError, match="found a link"):
        build_manifest(folder)
    (folder / "a.txt").unlink()
    (folder.parent / "outside").rename(folder / "content")
    (folder / "a.txt").symlink_to("content")
    write_manifest(folder)
    check_manifest(folder, digests=True)


def test_a_dangling_link_and_a_folder_in_a_file_s_place_are_refused(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").symlink_to("nowhere")
    with pytest.raises(ManifestError, match="empty: named by manifest\\.json, but is a dangling link"):
        check_manifest(folder, digests=False)
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(ManifestError, match="is not a regular file"):
        check_manifest(folder, digests=False)


def test_a_file_whose_name_a_manifest_cannot_hold_is_refused_when_one_is_built(folder: Path) -> None:
    (folder / "model card.md").write_text("", encoding="utf-8")
    with pytest.raises(ManifestError, match="found model card"):
        write_manifest(folder)


def test_the_folder_itself_may_be_reached_through_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    check_manifest(link, digests=True)
    assert plain_file(link, "a.txt", "test").is_file()
