"""The trial all-reduce ends within its deadline, whatever the ranks do, and says what they did."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vqserve.preflight.collective import Program, all_reduce


def ranks(*others: str) -> Program:
    """Real ranks, but for those for which a script stands in, the last ones."""

    def program(rank: int, store: str) -> Sequence[str]:
        at = rank - 2 + len(others)
        if at >= 0:
            return [sys.executable, "-c", others[at]]
        return [sys.executable, "-m", "vqserve.preflight.rank", str(rank), "2", "gloo", store, "60"]

    return program


def test_two_ranks_reduce_to_the_right_numbers() -> None:
    found = all_reduce(2, "gloo", 60)
    assert found.problem is None
    assert found.latency is not None
    assert found.bandwidth is not None
    assert 1e-6 < found.latency < 1
    assert 1e6 < found.bandwidth < 1e12
    assert (found.nccl, found.peers) == (None, None)


def test_a_rank_that_never_joins_is_named_within_the_deadline() -> None:
    begin = time.monotonic()
    found = all_reduce(2, "gloo", 12, program=ranks("import time; time.sleep(600)"))
    assert time.monotonic() - begin < 20
    assert found.problem == ("nothing after 12 s; rank 1: it did not start; rank 0: it waited for the others to join")


def test_ranks_that_hang_in_the_all_reduce_are_told_apart_from_those_that_do_not_join() -> None:
    joined = 'import time; print(\'{"step": "started"}\\n{"step": "joined"}\', flush=True); time.sleep(600)'
    found = all_reduce(2, "gloo", 5, program=ranks(joined, joined))
    assert found.problem is not None
    assert found.problem.endswith("rank 1: it hung in the first all-reduce")


def test_a_rank_that_fails_ends_the_trial_at_once_with_its_last_words() -> None:
    begin = time.monotonic()
    found = all_reduce(2, "gloo", 600, program=ranks("raise SystemExit('no room at all')"))
    assert time.monotonic() - begin < 60
    assert found.problem == "rank 1 ended with 1: no room at all"


def test_a_rank_that_is_killed_is_said_to_be() -> None:
    found = all_reduce(2, "gloo", 600, program=ranks("import os; os.kill(os.getpid(), 9)"))
    assert found.problem == "rank 1 was killed, as when memory runs out: it said nothing"


def test_wrong_numbers_are_a_failure() -> None:
    lines = ['{"step": "started"}', '{"step": "reduced", "right": false, "seconds": 1}', '{"step": "ended"}', "{", "7"]
    found = all_reduce(2, "gloo", 60, program=ranks(*["; ".join(f"print({line!r})" for line in lines)] * 2))
    assert found.problem == "rank 0 got wrong numbers from the all-reduce"


def test_nothing_is_left_running(tmp_path: Path) -> None:
    mark = f"left = {str(tmp_path)!r}; import time; time.sleep(600)"
    all_reduce(2, "gloo", 1, program=ranks(mark, mark))
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path).encode() not in process.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
