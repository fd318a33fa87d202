"""`vqserve-ops stage` against a server that misbehaves: in the end every byte is right, or one line says why not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ops.faulty_server import Fault, Site, drop, endless, lie, other, serving, status
from vqserve.cli import main as vqserve
from vqserve.format.manifest import MANIFEST, check_manifest
from vqserve_ops.cli import main
from vqserve_ops.stage import transfer
from vqserve_ops.stage.folder import Destination

Capture = pytest.CaptureFixture[str]
BIG = "model.safetensors"


def manifest_of(files: dict[str, bytes]) -> bytes:
    records = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return json.dumps({"manifest_version": 1, "files": records}).encode()


def some_files(seed: int = 0) -> dict[str, bytes]:
    source = random.Random(seed)
    files = {"config.json": b"{}", BIG: source.randbytes(3_000_001), "tokenizer.json": source.randbytes(70_000)}
    return {**files, "empty.txt": b"", MANIFEST: manifest_of(files | {"empty.txt": b""})}


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site(some_files())) as running:
        yield running


@pytest.fixture(autouse=True)
def _without_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE", 0.01)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    folder = tmp_path / "dest"
    folder.mkdir()
    return folder


def stage(site: Site, dest: Path, *more: str) -> int:
    return main(["stage", site.url, str(dest), *more])


def fails(capsys: Capture, *words: str) -> str:
    error = capsys.readouterr().err
    assert error.startswith("vqserve-ops: error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    return error


def is_whole(site: Site, dest: Path) -> bool:
    check_manifest(dest, digests=True)
    return all((dest / name).read_bytes() == data for name, data in site.files.items())


def test_a_checkpoint_comes_whole_readable_by_all_and_is_not_asked_for_again(site: Site, dest: Path) -> None:
    before = os.umask(0o077)
    try:
        assert stage(site, dest) == 0
    finally:
        os.umask(before)
    assert is_whole(site, dest)
    assert {stat.S_IMODE((dest / name).stat().st_mode) for name in site.files} == {0o644}
    asked = len(site.asked)
    assert stage(site, dest) == 0
    assert len(site.asked) == asked


def test_what_was_staged_is_what_verify_takes(demo_model: Path, dest: Path) -> None:
    files = {path.name: path.read_bytes() for path in demo_model.iterdir() if path.is_file()}
    with serving(Site(files)) as site:
        assert stage(site, dest) == 0
    assert vqserve(["verify", "--quiet", str(dest)]) == 0


def test_a_path_is_copied(site: Site, dest: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in site.files.items():
        (source / name).write_bytes(data)
    assert main(["stage", str(source), str(dest)]) == 0
    assert is_whole(site, dest)
    assert main(["stage", f"file://{source}", str(tmp_path / "second")]) == 0


@pytest.mark.parametrize(
    "faults",
    [
        [drop(100_000), drop(0), drop(1_000_000)],
        [status(500), status(503, Retry_After="0"), status(429, Retry_After="1"), status(502)],
        [lie(1000)],
        [lie(2_999_000), drop(500)],
        [other(b"x" * 3_000_001)],
    ],
    ids=["drops", "busy", "too-short-length", "short-then-drop", "wrong-once"],
)
def test_faults_that_pass_are_overcome(site: Site, dest: Path, faults: list[Fault]) -> None:
    site.faults = {BIG: faults}
    assert stage(site, dest) == 0
    assert is_whole(site, dest)
    assert not list(Destination(dest).state.glob("*.part"))
    assert not list(Destination(dest).state.glob("*.tag"))


def test_a_drop_costs_no_byte_twice(site: Site, dest: Path) -> None:
    site.faults = {BIG: [drop(1_000_000), drop(1_000_000)]}
    assert stage(site, dest) == 0
    assert site.sent[BIG] == len(site.files[BIG])
    ranges = [headers.get("Range") for name, headers, _ in site.asked if name == BIG]
    assert ranges == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_server_without_ranges_is_asked_from_the_beginning(site: Site, dest: Path) -> None:
    site.ranges = False
    site.faults = {BIG: [drop(1_000_000)]}
    assert stage(site, dest) == 0
    assert is_whole(site, dest)
    assert site.sent[BIG] == len(site.files[BIG]) + 1_000_000


def test_a_server_without_ranges_that_always_drops_is_given_up(site: Site, dest: Path, capsys: Capture) -> None:
    site.ranges = False
    site.faults = {BIG: [drop(1000)] * 30}
    assert stage(site, dest) == 1
    fails(capsys, BIG, "tries")
    assert not (dest / MANIFEST).exists()


def test_a_file_that_changes_between_tries_is_not_mixed(site: Site, dest: Path, capsys: Capture) -> None:
    changed = random.Random(1).randbytes(3_000_001)
    site.faults = {BIG: [lambda handler, _: handler.answer(changed, cut=1_000_000)]}
    assert stage(site, dest) == 0
    assert is_whole(site, dest)
    again = next(headers for name, headers, _ in site.asked[::-1] if name == BIG)
    assert again["If-Range"].startswith('"')


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (other(b"y" * 3_000_001), "expected sha256 "),
        (lie(9_000_000), "expected 3,000,001 bytes, found 9,000,000"),
        (endless, "expected 3,000,001 bytes, found more"),
    ],
)
def test_content_that_stays_wrong_is_named_and_no_checkpoint_is_left(
    site: Site, dest: Path, capsys: Capture, fault: Fault, problem: str
) -> None:
    site.faults = {BIG: [fault] * 5}
    assert stage(site, dest) == 1
    fails(capsys, f"/folder/{BIG}: {problem}", "twice")
    assert not (dest / MANIFEST).exists()
    assert not (dest / BIG).exists()
    assert sum(name == BIG for name, _, _ in site.asked) == 2


@pytest.mark.parametrize(("code", "word"), [(404, "address"), (403, "token's rights"), (401, "--token-file")])
@pytest.mark.parametrize("name", [MANIFEST, BIG])
def test_refusals_are_final(site: Site, dest: Path, capsys: Capture, code: int, word: str, name: str) -> None:
    site.faults = {name: [status(code)]}
    assert stage(site, dest) == 1
    fails(capsys, f"/folder/{name}: HTTP status {code}", word)


def test_a_source_that_nobody_answers_for_is_one_line(site: Site, dest: Path, capsys: Capture) -> None:
    assert main(["stage", "http://127.0.0.1:1/x/", str(dest)]) == 1
    fails(capsys, "http://127.0.0.1:1/x/manifest.json: nobody answers")


def test_the_manifest_has_to_be_the_one_asked_for(site: Site, dest: Path, capsys: Capture) -> None:
    right = hashlib.sha256(site.files[MANIFEST]).hexdigest()
    assert stage(site, dest, "--manifest-sha256", "0" * 64) == 1
    fails(capsys, f"expected sha256 {'0' * 64}, found {right}")
    assert stage(site, dest, "--manifest-sha256", right.upper()) == 0


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".hidden", "..", "manifest.json", "a\\b", "a\0b"])
def test_a_manifest_that_names_something_outside_is_refused(site: Site, dest: Path, capsys: Capture, name: str) -> None:
    site.files[MANIFEST] = manifest_of({name: b"x"})
    assert stage(site, dest) == 2
    fails(capsys, "plain names of files inside the folder", site.url)
    assert [path.name for path in dest.iterdir()] == [".cache"]


def test_a_manifest_that_never_ends_is_refused(site: Site, dest: Path, capsys: Capture) -> None:
    site.faults = {MANIFEST: [endless]}
    assert stage(site, dest) == 1
    fails(capsys, "expected at most")


def test_a_full_disk_is_said_before_anything_comes(
    site: Site, dest: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqserve_ops.stage.folder.free_bytes", lambda _: 3_000_000)
    assert stage(site, dest) == 2
    fails(capsys, "3,070,003 bytes are to come and 3,000,000 are free", "model.download.volume.size")
    assert not site.sent[BIG]


def test_a_disk_that_fills_up_is_one_line_and_keeps_what_came(
    site: Site, dest: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def full(path: Path, *args: object, **options: object) -> object:
        if path.name.startswith(BIG) and args == ("ab",):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    assert stage(site, dest) == 2
    fails(capsys, f"{dest / BIG}: the disk is full", "goes on where it stopped")


def test_a_token_goes_to_the_sources_host_alone_and_is_never_shown(
    site: Site, dest: Path, tmp_path: Path, capsys: Capture
) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret-token\n")
    with serving(Site(site.files)) as elsewhere:
        location = f"{elsewhere.url}{BIG}?signature=s3cret-signature"
        site.faults = {
            BIG: [status(302, Location=location)],
            "config.json": [status(302, Location="/folder/config.json")],
        }
        assert stage(site, dest, "--token-file", str(token)) == 0
        assert is_whole(site, dest)
        assert [headers.get("Authorization") for _, headers, _ in elsewhere.asked] == [None]
        assert {headers.get("Authorization") for _, headers, _ in site.asked} == {"Bearer s3cret-token"}
        elsewhere.faults = {BIG: [status(404)]}
        site.faults = {BIG: [status(302, Location=location)]}
        assert stage(site, tmp_path / "second", "--token-file", str(token)) == 1
    printed = capsys.readouterr()
    assert "s3cret" not in printed.out + printed.err
    assert b"s3cret" not in b"".join(path.read_bytes() for path in dest.rglob("*") if path.is_file())


def test_a_token_over_http_to_another_machine_is_refused(dest: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "token").write_text("t")
    assert main(["stage", "http://192.0.2.1/x", str(dest), "--token-file", str(tmp_path / "token")]) == 2
    fails(capsys, "https://")


def test_redirects_without_end_are_given_up(site: Site, dest: Path, capsys: Capture) -> None:
    site.faults = {BIG: [status(302, Location=f"/folder/{BIG}")] * 10}
    assert stage(site, dest) == 1
    fails(capsys, "redirects")


def test_a_query_is_kept_for_every_file_and_shown_nowhere(site: Site, dest: Path, capsys: Capture) -> None:
    assert main(["stage", f"{site.url}?sig=s3cret", str(dest)]) == 0
    assert {query for _, _, query in site.asked} == {"sig=s3cret"}
    assert main(["stage", f"{site.url}manifest.json?sig=renewed", str(dest)]) == 0
    assert {query for _, _, query in site.asked} == {"sig=s3cret"}
    assert "s3cret" not in capsys.readouterr().out + Destination(dest).marker.read_text()


def test_a_hub_is_asked_for_the_revision(site: Site, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{site.port}")
    monkeypatch.setenv("HF_TOKEN", "hub-token")
    assert main(["stage", "hf://org/name@v1.0", str(dest)]) == 0
    assert site.asked[0][1]["Authorization"] == "Bearer hub-token"


@pytest.mark.parametrize("url", ["s3://b/x", "https://u:p@host/x", "hf://name", "https:///x"])
def test_other_addresses_are_refused(url: str, dest: Path, capsys: Capture) -> None:
    assert main(["stage", url, str(dest)]) == 2
    assert "u:p" not in fails(capsys)


def test_a_second_stager_is_refused(site: Site, dest: Path, capsys: Capture) -> None:
    with Destination(dest).locked():
        assert stage(site, dest) == 1
    fails(capsys, "another `stage`")


def test_another_checkpoint_replaces_the_first_but_strangers_are_refused(
    site: Site, dest: Path, capsys: Capture
) -> None:
    assert stage(site, dest) == 0
    files = {name: data for name, data in some_files(2).items() if name not in (MANIFEST, "empty.txt")}
    with serving(Site({**files, MANIFEST: manifest_of(files)})) as second:
        (dest / "notes.txt").write_text("mine")
        assert stage(second, dest) == 2
        fails(capsys, f"{dest / 'notes.txt'}: expected an empty folder")
        (dest / "notes.txt").unlink()
        assert is_whole(site, dest)
        assert stage(second, dest) == 0
        assert is_whole(second, dest)


def test_an_earlier_checkpoint_that_is_half_replaced_is_none(site: Site, dest: Path, capsys: Capture) -> None:
    assert stage(site, dest) == 0
    first = dict(site.files)
    site.files = some_files(2)
    Destination(dest).marker.unlink()
    site.faults = {BIG: [other(b"y" * 3_000_001)] * 2}
    assert stage(site, dest) == 1
    assert not (dest / MANIFEST).exists()
    assert not Destination(dest).marker.exists()
    site.files = first
    assert stage(site, dest) == 0
    assert is_whole(site, dest)


def test_damage_in_place_is_repaired_when_it_is_staged_anew(site: Site, dest: Path) -> None:
    assert stage(site, dest) == 0
    Destination(dest).marker.unlink()
    (dest / BIG).write_bytes(bytes(3_000_001))
    site.sent.clear()
    assert stage(site, dest) == 0
    assert is_whole(site, dest)
    assert set(site.sent) == {MANIFEST, BIG}


def test_lost_and_found_is_passed_over(site: Site, dest: Path) -> None:
    (dest / "lost+found").mkdir()
    assert stage(site, dest) == 0


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def begin(*argv: str | Path) -> subprocess.Popen[str]:
        script = Path(sys.executable).with_name("vqserve-ops")
        running.append(subprocess.Popen([script, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_was_ended_half_way_goes_on_where_it_stopped(
    site: Site, dest: Path, start: Start, how: signal.Signals
) -> None:
    site.rate = 20_000
    process = start("stage", site.url, dest)
    parts = Destination(dest).state
    until(lambda: any(path.stat().st_size > 500_000 for path in parts.glob(f"{BIG}.*.part")))
    process.send_signal(how)
    began = time.monotonic()
    process.communicate()
    assert time.monotonic() - began < 5
    assert process.returncode == (-9 if how is signal.SIGKILL else 130)
    [part] = parts.glob(f"{BIG}.*.part")
    there = part.stat().st_size
    assert not (dest / MANIFEST).exists()
    site.rate = 0
    site.asked.clear()
    assert stage(site, dest) == 0
    assert is_whole(site, dest)
    [again] = [headers["Range"] for name, headers, _ in site.asked if name == BIG]
    assert again == f"bytes={there}-"


def test_wait_tells_how_far_it_is_and_ends_with_the_marker(site: Site, dest: Path, start: Start) -> None:
    waiting = start("stage", "--wait", site.url, dest)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == f"{dest}: waiting for {site.url}: its manifest has not come yet\n"
    assert waiting.poll() is None
    assert stage(site, dest) == 0
    out, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, err) == (0, "")
    assert out.endswith(f"{dest}: {site.url} is staged\n")


def test_wait_is_for_the_very_source_and_manifest(site: Site, dest: Path) -> None:
    assert stage(site, dest) == 0
    staged = Destination(dest)
    digest = hashlib.sha256(site.files[MANIFEST]).hexdigest()
    assert staged.is_staged(site.url, None)
    assert staged.is_staged(site.url, digest)
    assert not staged.is_staged(site.url, "0" * 64)
    assert not staged.is_staged("https://elsewhere/", None)
    (dest / BIG).unlink()
    assert not staged.is_staged(site.url, digest)


def test_wait_needs_no_write_access(site: Site, dest: Path) -> None:
    assert stage(site, dest) == 0
    dest.chmod(0o555)
    try:
        assert main(["stage", "--wait", site.url, str(dest)]) == 0
    finally:
        dest.chmod(0o755)
