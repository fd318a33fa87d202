"""Hands a page over where the container of a load test has ended: `python -m loadtest.handover LOCK PAGE`.

The load test holds a lock on a file for as long as it lives, whatever ends it. A container beside it waits for the lock
and prints the page, which `kubectl logs` then fetches.
"""

from __future__ import annotations

import fcntl
import sys
import time
from pathlib import Path

BEGIN_S = 600.0
"""For the load test to begin: its image may have to be pulled."""
LOOK_S = 0.2


def hold(lock: Path) -> None:
    """Locks a file that does not exist yet, until this process ends."""
    # Under another name until it is locked: whoever waits never sees it unlocked.
    part = lock.with_suffix(".part")
    file = part.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    part.replace(lock)
    _held.append(file)


_held: list[object] = []


def wait(lock: Path, begin_s: float = BEGIN_S) -> None:
    """Waits until whoever holds a lock is gone.

    Raises:
        TimeoutError: Nobody has held it.
    """
    deadline = time.monotonic() + begin_s
    while not lock.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no load test began within {begin_s:g} s")
        time.sleep(LOOK_S)
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def main(arguments: list[str]) -> int:
    """0: the page is on the standard output; 1: there is none."""
    lock, page = map(Path, arguments)
    try:
        wait(lock)
        sys.stdout.write(page.read_text(encoding="utf-8"))
    except (OSError, TimeoutError) as error:
        sys.stderr.write(f"loadtest: error: {error}; the load test's own log says why\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
