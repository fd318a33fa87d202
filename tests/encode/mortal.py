"""Encodes in a process of its own that can be killed at a chosen change to the file system."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vqserve import cli
from vqserve.encode import steps

_CHANGES = ("os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
_NEVER = 2**62

FEW_VECTORS = 2**13
"""To learn codebooks from where nobody looks at how good they are; it takes most of an encode's time otherwise."""


def encode_until(arguments: Sequence[str], folder: Path, kill_at: int = _NEVER) -> tuple[int, int]:
    """Runs `vqserve` and kills it just before it changes something in a folder for the `kill_at`th time.

    Its codebooks are learned from `FEW_VECTORS`. A change is a file opened for writing, renamed or removed, a folder
    made or removed, permissions set.

    Returns:
        The exit code, -9 if it was killed, and the number of changes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["encode.mortal", "vqserve.encode.command"])
    changes = context.RawValue(ctypes.c_int64, 0)
    process = context.Process(target=_run, args=(list(arguments), str(folder), kill_at, changes))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, changes.value


def _run(arguments: list[str], folder: str, kill_at: int, changes: ctypes.c_int64) -> None:
    def watch(event: str, args: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in _CHANGES or writes) and str(args[0]).startswith(folder):
            changes.value += 1
            if changes.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    steps.CODEBOOK_VECTORS = FEW_VECTORS
    sys.addaudithook(watch)
    sys.exit(cli.main(arguments))
