"""Waits until another has staged a checkpoint, in a folder that may be read-only here."""

from __future__ import annotations

import time

from vqserve.format.errors import CheckpointError
from vqserve.format.manifest import read_manifest
from vqserve_ops.stage.folder import Destination
from vqserve_ops.stage.progress import duration, far

_LOOK = 2.0
"""Seconds between two looks."""
_TELL = 10.0
"""Seconds between two lines at least, if something has changed."""
_STILL = 120.0
"""Seconds without a change until it is said where to look for the reason, and again each time."""


def wait_until_staged(destination: Destination, source: str, manifest_sha256: str | None) -> None:
    """Returns once the marker of this source and manifest is there; prints how far the bytes are until then."""
    said, told, changed, warned = "", 0.0, time.monotonic(), time.monotonic()
    while not destination.is_staged(source, manifest_sha256):
        now, found = time.monotonic(), how_far(destination)
        if found != said and now - told >= _TELL:
            print(f"{destination.path}: waiting for {source}: {found}", flush=True)
            said, told, changed, warned = found, now, now, now
        elif now - warned >= _STILL:
            remedy = "look at the download: kubectl logs --selector app.kubernetes.io/component=stage --tail 20"
            print(f"{destination.path}: nothing has changed for {duration(now - changed)}; {remedy}", flush=True)
            warned = now
        time.sleep(_LOOK)
    print(f"{destination.path}: {source} is staged", flush=True)


def how_far(destination: Destination) -> str:
    """How much of the checkpoint that is being staged is here."""
    try:
        records = read_manifest(destination.incoming)
    except (CheckpointError, OSError):
        return "its manifest has not come yet"
    here = sum(destination.arrived(name, record) for name, record in records.items())
    return far(here, sum(record.size for record in records.values()))
