"""Two ranks, as a user starts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.asking import right_of_twelve
from e2e.conftest import serving, wait_for

pytestmark = pytest.mark.e2e


def test_two_ranks_calculate(demo_model: Path, tmp_path: Path) -> None:
    with serving(demo_model, tmp_path, "--tensor-parallel-size", "2", "--", "--enable-expert-parallel") as server:
        wait_for(server, "/health", 200)
        assert right_of_twelve(server) >= 11
