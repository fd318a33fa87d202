"""`/ready` and `/drain` of the real server: from its start to its end, and with an engine that answers wrongly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from e2e.conftest import CONTEXT, KEY, STALL, Server, Watched, get, scraped, serving, wait_for, wait_until
from vqserve.cli import main
from vqserve.format.known_answers import KNOWN_ANSWERS, read_known_answers
from vqserve.format.manifest import write_manifest

pytestmark = pytest.mark.e2e

MODEL = "glm-5.2"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 36 * 47?"}]
LONG = 400
"""Tokens of a stream that is still running when the server has been told to stop, and over before 30 s are."""
LONG_PROMPT = CONTEXT // 2 + 76
"""Tokens of a prompt that has a step of the engine for itself."""
DEMO = Path(__file__).parents[2] / "plugin" / "demo"


@pytest.fixture
def served(watched: Watched) -> Server:
    """The tests below take it through its life, in their order."""
    return watched.server


def state(body: str) -> tuple[str, str]:
    """Status and reason."""
    answer = json.loads(body)
    return answer["status"], answer["reason"]


@contextmanager
def stream(server: Server) -> Iterator[Iterator[bytes]]:
    """The lines of a long answer as they come; the first has come already."""
    body = {
        "messages": QUESTION,
        "max_tokens": LONG,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as lines:
        assert next(lines).startswith(b"data: {")
        yield (line.strip() for line in lines if line.strip())


def test_a_server_is_not_ready_before_it_has_answered_its_warm_up(watched: Watched, demo_model: Path) -> None:
    *before, ready = map(state, watched.states)
    prompts = len(read_known_answers(demo_model))
    assert prompts >= 6
    assert before[0] == ("warming up", f"0 of {prompts} warm-up prompts are answered")
    assert {status for status, _ in before} == {"warming up"}
    assert ready == ("ready", f"{prompts} known answers came")


def test_a_probe_needs_no_key_where_a_request_does(served: Server) -> None:
    wait_for(served, "/ready", 200)
    assert get(served, "/v1/models")[0] == 401
    assert served.client.models.list().data


def test_an_engine_with_many_long_prompts_is_alive(served: Server) -> None:
    wait_for(served, "/ready", 200)
    began, prompts = time.monotonic(), list[Future[int]]()
    with ThreadPoolExecutor(4) as pool:
        while time.monotonic() - began < STALL + 2:
            while sum(not prompt.done() for prompt in prompts) < 4:
                prompts.append(pool.submit(prefill, served))
            wait(prompts, 0.2)
            assert get(served, "/live")[0] == 200
    assert {prompt.result() for prompt in prompts} == {LONG_PROMPT}


def prefill(server: Server) -> int:
    """Has the engine compute a prompt that fills more than half of a step; its tokens."""
    usage = server.client.completions.create(model=MODEL, prompt=[20] * LONG_PROMPT, max_tokens=1).usage
    assert usage
    return usage.prompt_tokens


def test_a_frozen_engine_is_stuck_once_it_is_asked(served: Server) -> None:
    wait_for(served, "/ready", 200)
    engine = engine_of(served)
    with frozen(engine):
        assert get(served, "/live")[0] == 200
        assert silence(served) == 0
    with stream(served) as lines:
        with frozen(engine):
            began = time.monotonic()
            wait_for(served, "/live", 503)
            assert STALL - 1 <= time.monotonic() - began < STALL + 5
            assert state(get(served, "/live")[1])[0] == state(get(served, "/ready")[1])[0] == "stuck"
            assert silence(served) > STALL
        *_, done = lines
    assert done == b"data: [DONE]"
    assert get(served, "/live")[0] == get(served, "/ready")[0] == 200


def silence(server: Server) -> float:
    """What the server says of how long no token has come."""
    return scraped(server)["vqserve_seconds_since_last_token"][""]


def engine_of(server: Server) -> int:
    """The process of vLLM's engine, which is a child of the API server's."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    [engine] = [int(child) for child in children if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return engine


@contextmanager
def frozen(process: int) -> Iterator[None]:
    """Stops a process as a debugger would, and has it go on."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def test_a_drain_ends_readiness_but_not_service(served: Server, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for(served, "/ready", 200)
    assert main(["drain", "--port", served.url.rpartition(":")[2]]) == 0
    assert capsys.readouterr().out.startswith("draining: ")
    assert get(served, "/ready")[0] == 503
    assert get(served, "/health")[0] == 200
    at_once = {"chat_template_kwargs": {"enable_thinking": False}}  # this server closes long thinking
    answer = served.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "12 + 34 = ?"}], extra_body=at_once
    )
    assert "46" in (answer.choices[0].message.content or "")


def test_a_stopping_server_refuses_requests_and_finishes_its_streams(served: Server) -> None:
    wait_for(served, "/health", 200)
    with stream(served) as lines:
        served.process.send_signal(signal.SIGTERM)
        wait_until(served, "/ready", lambda _, body: "the server is stopping" in body)
        with pytest.raises(openai.APIStatusError, match="the server is stopping") as refusal:
            served.client.chat.completions.create(model=MODEL, messages=QUESTION)
        assert get(served, "/ready")[0] == refusal.value.status_code == 503
        assert refusal.value.response.headers["Retry-After"] == "5"
        assert refusal.value.type == "ServiceUnavailableError"
        *_, usage, done = lines
    assert json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] == LONG
    assert done == b"data: [DONE]"
    assert served.process.wait(60) == 0


def asking(model: Path, folder: Path, answers: dict[str, Any]) -> Path:
    """A copy of a checkpoint with other known answers."""
    shutil.copytree(model, folder)
    (folder / KNOWN_ANSWERS).write_text(json.dumps(answers), encoding="utf-8")
    write_manifest(folder)
    return folder


def refusal_of(server: Server) -> str:
    """Why a server refuses to be ready, which it does for good and also writes into its log."""
    *_, body = wait_until(server, "/ready", lambda _, body: state(body)[0] != "warming up")
    status, reason = state(body)
    assert status == "refused"
    assert get(server, "/ready") == (503, body)
    assert f"not ready, for good: {reason}" in server.log.read_text(encoding="utf-8")
    return reason


def test_an_engine_that_answers_wrongly_is_refused_with_what_it_said_and_a_dead_one_too(
    demo_model: Path, tmp_path: Path
) -> None:
    answers = json.loads((DEMO / KNOWN_ANSWERS).read_text(encoding="utf-8"))
    answers["prompts"][1]["answer"] = "186"
    with serving(asking(demo_model, tmp_path / "model", answers), tmp_path) as server:
        reason = refusal_of(server)
        assert reason.startswith("known answer 2 of 6 is wrong: to '太郎は")
        assert "expected '186', found '答えは185です。'" in reason
        assert "--attention dense" in reason
        [engine] = set(re.findall(r"\(EngineCore pid=(\d+)\)", server.log.read_text(encoding="utf-8")))
        os.kill(int(engine), signal.SIGKILL)
        *_, body = wait_until(server, "/ready", lambda status, body: status == 503 and state(body)[0] != "refused")
        assert state(body)[0] == "engine dead"
