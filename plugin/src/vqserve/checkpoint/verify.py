"""`vqserve verify PATH`: everything that can be checked about a checkpoint without running the model.

That is what `vqserve serve` checks before it starts, and besides, whatever the size, the sha256 of every file and that
no float anywhere is NaN or infinite. Each file is read once for both, by a thread of its own: sha256 goes through a
file from its first byte to its last. All that is wrong is listed, one line for each place.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

import numpy as np
from tqdm import tqdm

from vqserve.arguments import positive
from vqserve.format.companions import CHAT_TEMPLATE, check_companions
from vqserve.format.errors import CheckpointError
from vqserve.format.files import (
    check_folder,
    check_tensors,
    check_used,
    described,
    read_config,
    read_tensors,
    readable,
)
from vqserve.format.headers import StoredTensor, read_header
from vqserve.format.known_answers import read_known_answers
from vqserve.format.layout import DTYPE_BYTES
from vqserve.format.manifest import FileRecord, check_digest, check_sizes, read_manifest
from vqserve.format.values import FULL_EXPONENT, check_codebooks, check_zero_points, not_finite
from vqserve.model.template import check_template
from vqserve.tables import check_targets, write_json

_PIECE = 1 << 20
"""Bytes that a thread holds at a time; a multiple of every element's size."""
_SHOWN = 50
"""Lines of findings on a terminal; `--json` has them all."""


@dataclass(frozen=True)
class Verdict:
    """What came of verifying a checkpoint.

    Attributes:
        findings: All that is wrong, by place.
        files: How many files were read whole, from the first byte to the last.
        nbytes: Their bytes.
        tensors: How many tensors were found.
    """

    findings: tuple[CheckpointError, ...]
    files: int
    nbytes: int
    tensors: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `vqserve verify`."""
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of the checkpoint")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="files read at a time (default: as many as cores)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar; there is none without a terminal either")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to a file")


def run(args: argparse.Namespace) -> int:
    """Verifies a checkpoint; 0 if nothing is wrong, else 2 and a line on stderr for each thing that is.

    Raises:
        CheckpointError: There is no checkpoint at all.
        UsageError: The result cannot be written.
    """
    check_folder(args.path)
    check_targets({"--json": args.json}, [args.path])
    start = time.perf_counter()
    verdict = verify(args.path, args.threads or len(os.sched_getaffinity(0)), quiet=args.quiet)
    seconds = time.perf_counter() - start
    if args.json is not None:
        write_json(args.json, _as_json(args.path, verdict, seconds))
    for problem in verdict.findings[:_SHOWN]:
        print(f"vqserve: error: {problem}", file=sys.stderr)
    if len(verdict.findings) > _SHOWN:
        print(f"vqserve: error: and {len(verdict.findings) - _SHOWN} more; --json FILE lists all", file=sys.stderr)
    if verdict.findings:
        return 2
    print(
        f"{args.path}: {verdict.files} files, {verdict.nbytes / 1e6:.1f} MB, {verdict.tensors} tensors; "
        "manifest, sizes, sha256, headers, shapes, codebooks and values are right "
        f"({seconds:.1f} s, {verdict.nbytes / 1e9 / seconds:.2f} GB/s)"
    )
    return 0


def verify(folder: Path, threads: int, *, quiet: bool = True) -> Verdict:
    """Checks everything, reading `threads` files at a time; holds 1 MiB of each.

    Raises:
        KeyboardInterrupt: The user has had enough; the threads have ended.
    """
    found = _Findings()
    records, tensors = _check_structure(folder, found)
    total = sum(record.size for record in records.values())
    stop, lock = Event(), Lock()
    # None: shown if stderr is a terminal.
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=True if quiet else None) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        with ThreadPoolExecutor(threads) as pool:
            try:
                largest_first = sorted(records.items(), key=lambda item: -item[1].size)
                jobs = [
                    pool.submit(_read, folder / name, record, found, advance, stop) for name, record in largest_first
                ]
                for job in jobs:
                    job.result()
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
    return Verdict(found.sorted(), len(records), total, len(tensors))


class _Findings:
    """What is wrong, the first thing for each place: a cut file has another size, another digest and a wrong header."""

    def __init__(self) -> None:
        self._by_place: dict[str, CheckpointError] = {}
        self.noted_times = 0

    def note(self, problem: CheckpointError) -> None:
        self.noted_times += 1
        self._by_place.setdefault(problem.where, problem)

    @contextmanager
    def noted(self, path: Path) -> Iterator[None]:
        """Goes on after the block, whatever of `path` was refused in it."""
        try:
            with readable(path):
                yield
        except CheckpointError as problem:
            self.note(problem)

    def sorted(self) -> tuple[CheckpointError, ...]:
        return tuple(self._by_place[place] for place in sorted(self._by_place))


def _check_structure(folder: Path, found: _Findings) -> tuple[Mapping[str, FileRecord], Mapping[str, StoredTensor]]:
    """Checks all that takes little reading; returns the files that are worth reading whole, and the tensors."""
    files: dict[str, FileRecord] = {}
    tensors: Mapping[str, StoredTensor] = {}
    with found.noted(folder):
        records = read_manifest(folder)
        files = {name: records[name] for name in check_sizes(folder, records, found.note)}
    with found.noted(folder):
        read_known_answers(folder)
    with found.noted(folder):
        check_template(folder / CHAT_TEMPLATE)
    with found.noted(folder):
        config = read_config(folder, links=False)
        geometry, quant, specs = described(folder, config)
        check_companions(folder, files, config, geometry.vocab_size, found.note)
        before = found.noted_times
        tensors = read_tensors(folder, links=False, report=found.note)
        # What a damaged file should hold is not missing too; and only right tensors have values to look at.
        if found.noted_times == before:
            check_used(folder, files, tensors, found.note)
            check_tensors(tensors, specs, report=found.note)
        if found.noted_times == before:
            check_codebooks(tensors, quant, found.note)
            check_zero_points(tensors, quant, found.note)
    return files, tensors


def _read(path: Path, record: FileRecord, found: _Findings, advance: Callable[[int], None], stop: Event) -> None:
    """Reads a file once, for its digest and the values of its float tensors."""
    tensors: Sequence[StoredTensor] = ()
    if path.suffix == ".safetensors":
        with found.noted(path):
            tensors = tuple(read_header(path).values())
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_PIECE, record.size)))
    with found.noted(path), path.open("rb", buffering=0) as file:
        for tensor, start, length in _pieces(tensors, record.size):
            if stop.is_set():
                return
            piece = buffer[: _fill(file, buffer[:length])]
            digest.update(piece)
            if tensor is not None and len(piece) == length:
                _check_values(tensor, start, piece, found)
            advance(length)
        check_digest(path, record, digest.hexdigest(), found.note)


def _pieces(tensors: Sequence[StoredTensor], size: int) -> Iterator[tuple[StoredTensor | None, int, int]]:
    """Cuts a file into pieces: tensor (None before the first), first byte counted from the tensor's, bytes."""
    before = tensors[0].offset if tensors else size
    for tensor, nbytes in [(None, before), *((tensor, tensor.nbytes) for tensor in tensors)]:
        for start in range(0, nbytes, _PIECE):
            yield tensor, start, min(_PIECE, nbytes - start)


def _fill(file: io.FileIO, buffer: memoryview) -> int:
    """Reads until the buffer is full or the file ends; returns how many bytes."""
    filled = 0
    while filled < len(buffer):
        got = file.readinto(buffer[filled:])
        if not got:
            break
        filled += got
    return filled


def _check_values(tensor: StoredTensor, start: int, piece: memoryview, found: _Findings) -> None:
    if tensor.dtype in FULL_EXPONENT:
        width, full = DTYPE_BYTES[tensor.dtype], FULL_EXPONENT[tensor.dtype]
        wrong = (np.frombuffer(piece, f"<u{width}") & full) == full
        if wrong.any():
            found.note(not_finite(tensor, start // width + int(wrong.argmax())))


def _as_json(path: Path, verdict: Verdict, seconds: float) -> dict[str, object]:
    findings = [
        {"where": problem.where, "problem": problem.problem, "remedy": problem.remedy} for problem in verdict.findings
    ]
    return {
        "path": str(path),
        "files": verdict.files,
        "bytes": verdict.nbytes,
        "tensors": verdict.tensors,
        "seconds": seconds,
        "findings": findings,
    }
