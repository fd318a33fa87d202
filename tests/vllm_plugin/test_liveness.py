"""When an engine counts as stuck, and what counts as a refusal; with a frozen engine see e2e."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from vllm_plugin.test_guard import KEY, SHOWN, app_of
from vllm_plugin.test_readiness import right
from vqserve.vllm_plugin.liveness import Liveness, refusal
from vqserve.vllm_plugin.readiness import Readiness


@dataclass
class Steps:
    """An engine that finished its last step and token some seconds ago."""

    ago: float
    last_step: float = field(init=False)
    last_token: float = field(init=False)

    def __post_init__(self) -> None:
        self.last_step = self.last_token = time.monotonic() - self.ago


def arrived(*ago: float) -> list[float]:
    return [time.time() - each for each in ago]


@pytest.mark.parametrize(
    ("silent", "waiting", "stuck"),
    [
        pytest.param(3600, (), False, id="idle"),
        pytest.param(3600, (5,), False, id="asked-after-an-idle-hour"),
        pytest.param(1, (3600, 50), False, id="busy-for-an-hour"),
        pytest.param(59, (3600,), False, id="a-long-step"),
        pytest.param(61, (3600,), True, id="silent-for-too-long"),
        pytest.param(3600, (5, 61), True, id="never-began-with-the-first"),
    ],
)
def test_only_an_engine_that_owes_a_step_is_stuck(silent: float, waiting: tuple[float, ...], stuck: bool) -> None:
    assert Liveness(Steps(silent), lambda: arrived(*waiting), 60).is_stuck() == stuck


def test_a_long_prefill_is_no_token_and_yet_a_step() -> None:
    steps = Steps(100)
    steps.last_step = time.monotonic()
    liveness = Liveness(steps, lambda: arrived(90), 60)
    assert liveness.since_token() == pytest.approx(90, abs=1)
    assert liveness.since_step() < 1
    assert not liveness.is_stuck()


def test_seconds_are_never_negative_though_a_clock_is_set_back() -> None:
    assert Liveness(Steps(100), lambda: arrived(-30), 60).since_token() == 0


@pytest.mark.parametrize(
    ("status", "message", "cause"),
    [
        (200, "maximum context length", None),
        (404, "", None),
        (400, "temperature must be non-negative", "invalid"),
        (401, "", None),
        (503, "", "stopping"),
    ],
)
def test_answers_that_are_refusals_have_a_cause(status: int, message: str, cause: str | None) -> None:
    assert refusal(status, json.dumps({"error": {"message": message}}).encode()) == cause


class Refused(list[str]):
    """A log that keeps the causes of refusals."""

    def refused(self, cause: str) -> None:
        self.append(cause)

    def end_phase(self, phase: str) -> None:
        raise AssertionError(phase)


def test_a_refused_request_is_counted_and_a_refusing_probe_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = app_of(monkeypatch, "--api-key", KEY), Refused()
    app.state.vqserve_readiness = Readiness(Path(), right, lambda: False, log=seen)
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/ready").status_code == 503
    assert client.get("/v1/nothing", headers=SHOWN).status_code == 404
    assert seen == []
    app.state.vqserve_readiness.stopping = True
    assert client.get("/v1/nothing", headers=SHOWN).status_code == 503
    assert seen == ["stopping"]


def test_a_stuck_engine_shows_in_live_and_in_ready_and_not_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    app, stuck = app_of(monkeypatch, "--api-key", KEY), True
    app.state.vqserve_readiness = Readiness(Path(), right, lambda: False, lambda: stuck)
    client = TestClient(app)
    for path in ("/live", "/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["status"]) == (503, "stuck")
    stuck = False
    assert client.get("/live").json() == {"status": "alive", "reason": "the engine is idle, or moves"}
    app.state.vqserve_readiness = Readiness(Path(), right, lambda: True)
    assert (client.get("/live").status_code, client.get("/live").json()["status"]) == (503, "engine dead")
