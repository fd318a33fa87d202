"""`vqserve-ops stage`: fetches a checkpoint into a folder, or waits until another has."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from pathlib import Path

from vqserve.format.errors import ManifestError, UsageError
from vqserve.format.manifest import MANIFEST, FileRecord, read_manifest
from vqserve_ops.errors import FailedError
from vqserve_ops.stage.folder import Destination
from vqserve_ops.stage.http import Web
from vqserve_ops.stage.progress import duration
from vqserve_ops.stage.sources import Address, Folder, InterruptedSourceError, Source, parse
from vqserve_ops.stage.transfer import Transfer, pause_before
from vqserve_ops.stage.wait import wait_until_staged

_MANIFEST_BYTES = 16 << 20
"""More than a manifest of 50,000 files has."""
_MANIFEST_TRIES = 8
_EVERY = 5.0
"""Seconds between two lines of progress."""
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_HUB_TOKEN = "HF_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve-ops stage`."""
    parser.add_argument(
        "source", metavar="URL", help="https://host/folder/ (a query is kept), hf://organization/name@revision, a path"
    )
    parser.add_argument("destination", type=Path, metavar="DEST", help="folder of the checkpoint")
    parser.add_argument("--manifest-sha256", type=_digest, metavar="HEX", help="what manifest.json has to hash to")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"token for the source (for hf://, by default ${_HUB_TOKEN})"
    )
    parser.add_argument("--parallel", type=_count, default=8, metavar="N", help="files at a time, default: %(default)s")
    parser.add_argument("--wait", action="store_true", help="fetch nothing: wait until another `stage` is done")
    parser.epilog = (
        "Run again, it goes on where it stopped; done already, it ends at once. Exit code 1: the source failed, or "
        "another `stage` is at work in DEST. Proxies are taken from http_proxy, https_proxy and no_proxy."
    )


def run(args: argparse.Namespace) -> int:
    """Stages, or waits.

    Raises:
        UsageError: An argument is wrong, or the checkpoint does not fit on the disk.
        FailedError: The source failed, or what it holds is not what its manifest says.
        ManifestError: The manifest is not one.
    """
    where = parse(args.source)
    destination = Destination(args.destination)
    if args.wait:
        wait_until_staged(destination, where.name if isinstance(where, Folder) else where.shown, args.manifest_sha256)
        return 0
    with destination.locked():
        stage(_source(where, args), destination, args.manifest_sha256, args.parallel)
    return 0


def _source(where: Address | Folder, args: argparse.Namespace) -> Source:
    if isinstance(where, Address):
        return Web(where, _token(args.token_file, args.source), args.parallel)
    if where.path.resolve() == args.destination.resolve():
        raise UsageError(f"{args.destination}: source and destination are the same folder; name another")
    return where


def stage(source: Source, destination: Destination, manifest_sha256: str | None, parallel: int) -> None:
    """Brings everything of a checkpoint that is not there yet; the manifest and the marker come last."""
    if destination.is_staged(source.name, manifest_sha256):
        print(f"{destination.path}: {source.name} is staged already", flush=True)
        return
    manifest, records = fetch_manifest(source, destination, manifest_sha256)
    destination.begin(manifest, records)
    transfer = Transfer(source, destination, records)
    total = transfer.progress.total
    print(f"{destination.path}: {len(records)} files, {total / 1e9:,.2f} GB, from {source.name}", flush=True)
    missing = transfer.keep_what_is_right(parallel, lambda: _tell("checking", transfer), _EVERY)
    transfer.check_room(missing)
    transfer.fetch(missing, parallel, lambda: _tell("fetching", transfer), _EVERY)
    destination.finish(manifest, source.name)
    _tell("staged, every sha256 is right:", transfer)
    seconds = duration(transfer.progress.seconds)
    print(f"{destination.path}: fetched {transfer.progress.fetched:,} bytes in {seconds}", flush=True)


def fetch_manifest(
    source: Source, destination: Destination, manifest_sha256: str | None
) -> tuple[bytes, dict[str, FileRecord]]:
    """The source's manifest, checked; it is kept where `--wait` reads how much there is to come."""
    manifest = _read_whole(source)
    found = hashlib.sha256(manifest).hexdigest()
    if manifest_sha256 and found != manifest_sha256:
        problem = f"expected sha256 {manifest_sha256}, found {found}"
        raise FailedError(f"{source.where(MANIFEST)}: {problem}; it is another checkpoint: correct the address or HEX")
    path = destination.incoming / MANIFEST
    path.write_bytes(manifest)
    try:
        return manifest, read_manifest(destination.incoming)
    except ManifestError as error:
        path.unlink()
        where = error.where.replace(str(path), source.where(MANIFEST))
        raise ManifestError(where, error.problem, error.remedy) from error


def _read_whole(source: Source) -> bytes:
    for attempt in range(1, _MANIFEST_TRIES + 1):
        try:
            content = bytearray()
            with source.open(MANIFEST, 0, "") as opened:
                for chunk in opened.chunks:
                    content += chunk
                    if len(content) > _MANIFEST_BYTES:
                        problem = f"expected at most {_MANIFEST_BYTES:,} bytes, found more"
                        raise FailedError(f"{source.where(MANIFEST)}: {problem}; check the address")
            if opened.length is not None and len(content) != opened.length:
                raise InterruptedSourceError("the answer ended early")
            return bytes(content)
        except InterruptedSourceError as error:
            if attempt == _MANIFEST_TRIES:
                problem = f"{error}, in {attempt} tries; check the address, then run it again"
                raise FailedError(f"{source.where(MANIFEST)}: {problem}") from error
            pause_before(attempt, error.wait)
    raise AssertionError("the last try returns or raises")


def _tell(what: str, transfer: Transfer) -> None:
    print(f"{what} {transfer.progress.line()}", flush=True)


def _token(path: Path | None, source: str) -> str:
    if path is None:
        return os.environ.get(_HUB_TOKEN, "") if source.startswith("hf://") else ""
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise UsageError(f"--token-file {path}: cannot be read ({reason}); name a file that holds the token") from None
    if not token or not token.isprintable() or " " in token:
        raise UsageError(f"--token-file {path}: expected one token, found none or several words; write it there alone")
    return token


def _digest(text: str) -> str:
    if _DIGEST.fullmatch(text) is None:
        raise argparse.ArgumentTypeError("expected 64 hexadecimal digits")
    return text.lower()


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("expected 1..64")
    return int(text)
