"""What `/ready` says, without an engine; with one see e2e."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from fastapi import FastAPI
from starlette.testclient import TestClient

from vqserve.format.known_answers import KNOWN_ANSWERS, KnownAnswer
from vqserve.settings import WARM_UP_SECONDS
from vqserve.vllm_plugin.readiness import Readiness, ReadinessPlugin, is_local
from vqserve.vllm_plugin.warm_up import Ask, Reply

PROMPTS = [
    {"messages": [{"role": "user", "content": "36 * 47 = ?"}], "max_tokens": 64, "answer": "1692"},
    {"messages": [{"role": "user", "content": "12 + 34 = ?"}], "max_tokens": 64, "answer": "46"},
]


async def right(prompt: KnownAnswer) -> Reply:
    return Reply(f"It is {prompt.answer}.", "", "stop")


async def never(prompt: KnownAnswer) -> Reply:
    await asyncio.Event().wait()
    return await right(prompt)


def saying(content: str, reasoning: str = "", finish_reason: str = "stop") -> Ask:
    async def ask(prompt: KnownAnswer) -> Reply:
        return Reply(content, reasoning, finish_reason)

    return ask


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restores the signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with known answers."""
    (tmp_path / KNOWN_ANSWERS).write_text(json.dumps({"version": 1, "prompts": PROMPTS}), encoding="utf-8")
    return tmp_path


async def settled(readiness: Readiness) -> tuple[str, str]:
    """The state after the warm-up, begun under handlers as vLLM registers them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    readiness.start()
    while (state := readiness.state())[0] == "warming up":
        await asyncio.sleep(0)
    return state


def after_warm_up(folder: Path, ask: Ask) -> tuple[str, str]:
    return asyncio.run(settled(Readiness(folder, ask, lambda: False)))


def test_right_answers_make_it_ready(folder: Path) -> None:
    assert after_warm_up(folder, right) == ("ready", "2 known answers came")


def test_the_state_tells_how_far_the_warm_up_is(folder: Path) -> None:
    seen: list[tuple[str, str]] = []

    async def ask(prompt: KnownAnswer) -> Reply:
        seen.append(readiness.state())
        return await right(prompt)

    readiness = Readiness(folder, ask, lambda: False)
    assert readiness.state() == ("warming up", "the server is starting")
    asyncio.run(settled(readiness))
    assert seen == [("warming up", f"{done} of 2 warm-up prompts are answered") for done in (0, 1)]


def test_without_known_answers_it_asks_both_ways_and_takes_any_reply(tmp_path: Path) -> None:
    thinking = []

    async def ask(prompt: KnownAnswer) -> Reply:
        thinking.append(prompt.chat_template_kwargs["enable_thinking"])
        return Reply("", "hm", "length")

    assert after_warm_up(tmp_path, ask) == ("ready", "the checkpoint has no known answers")
    assert thinking == [True, False]


@pytest.mark.parametrize(
    ("ask", "found"),
    [
        (saying("It is 1693."), "found 'It is 1693.';"),
        (saying("x" * 201), f"found '{'x' * 200}...';"),
        (saying("", "1692? 1692!", "length"), "found thinking alone (ended by length): '1692? 1692!';"),
        (saying("", "", "abort"), "found nothing (ended by abort);"),
    ],
)
def test_a_wrong_answer_is_shown(ask: Ask, found: str, folder: Path) -> None:
    status, reason = after_warm_up(folder, ask)
    assert status == "refused"
    assert reason.startswith("known answer 1 of 2 is wrong: to '36 * 47 = ?' expected '1692', found")
    assert found in reason
    assert "--attention dense" in reason


def test_an_engine_that_never_answers_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WARM_UP_SECONDS, "0.01")
    status, reason = after_warm_up(folder, never)
    assert status == "refused"
    assert reason.startswith("the warm-up was not over after 0.01 s: 0 of 2 warm-up prompts are answered;")
    assert "--warm-up-seconds" in reason


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "-1", "0"])
def test_a_time_that_is_no_number_is_refused(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WARM_UP_SECONDS, text)
    status, reason = after_warm_up(folder, right)
    assert (status, reason.split(";")[0]) == ("refused", f"{WARM_UP_SECONDS}={text}: expected a number of seconds")


def test_known_answers_that_cannot_be_read_are_refused(folder: Path) -> None:
    (folder / KNOWN_ANSWERS).write_text("[]", encoding="utf-8")
    status, reason = after_warm_up(folder, right)
    assert status == "refused"
    assert f"{folder / KNOWN_ANSWERS}: expected a JSON object" in reason


def test_whatever_else_goes_wrong_refuses_readiness(folder: Path) -> None:
    async def ask(prompt: KnownAnswer) -> Reply:
        raise KeyError("no such thing")

    assert after_warm_up(folder, ask) == ("refused", "the warm-up failed: KeyError: 'no such thing'")


def test_a_dead_engine_is_not_ready(folder: Path) -> None:
    assert Readiness(folder, right, lambda: True).state()[0] == "engine dead"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_readiness_and_warm_up_and_still_reaches_vllm(
    run: Callable[[Awaitable[None]], None], number: signal.Signals, folder: Path
) -> None:
    async def life() -> None:
        cancelled, told = asyncio.Event(), asyncio.Event()

        async def ask(prompt: KnownAnswer) -> Reply:
            try:
                os.kill(os.getpid(), number)
                return await never(prompt)
            finally:
                cancelled.set()

        for each in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(each, lambda: None)
        asyncio.get_running_loop().add_signal_handler(number, told.set)
        readiness = Readiness(folder, ask, lambda: False)
        readiness.start()
        await told.wait()
        assert readiness.stopping
        status, reason = readiness.state()
        assert (status, reason.split(":")[0]) == ("draining", "the server is stopping")
        await cancelled.wait()

    run(life())


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """An application with our routes, and one of a model's."""
    app = FastAPI()
    app.add_api_route("/v1/chat/completions", lambda: "answer", methods=["POST"])
    app.add_api_route("/health", lambda: "healthy", methods=["GET"])
    app.state.args = Namespace(api_key=None)
    ReadinessPlugin().attach_router(app)
    app.state.vqserve_readiness = Readiness(tmp_path, right, lambda: False)
    return app


def client(app: FastAPI, host: str = "127.0.0.1", **options: Any) -> TestClient:
    return TestClient(app, client=(host, 50000), **options)


def test_a_drain_shows_in_ready_and_requests_are_still_served(app: FastAPI) -> None:
    here = client(app)
    asked = here.post("/drain")
    assert (asked.status_code, asked.json()["status"]) == (200, "draining")
    ready = here.get("/ready")
    assert (ready.status_code, ready.json()) == (503, asked.json())
    assert here.post("/v1/chat/completions").status_code == 200


def test_only_this_machine_may_ask_for_a_drain(app: FastAPI) -> None:
    assert client(app, host="203.0.113.5").post("/drain").status_code == 403
    assert client(app).get("/drain").status_code == 405
    assert client(app).get("/ready").json()["status"] == "warming up"


@pytest.mark.parametrize("root", ["", "/behind/a/proxy"])
def test_a_stopping_server_takes_no_requests_but_can_be_looked_at(root: str, app: FastAPI) -> None:
    app.state.vqserve_readiness.stopping = True
    here = client(app, root_path=root)
    refusal = here.post(f"{root}/v1/chat/completions")
    assert refusal.status_code == 503
    assert refusal.headers["Retry-After"] == "5"
    assert refusal.headers["Connection"] == "close"
    assert refusal.json()["error"].keys() == {"message", "type", "param", "code"}
    assert here.get(f"{root}/health").status_code == 200
    assert here.get(f"{root}/ready").json()["status"] == "draining"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.7", False),
        ("::ffff:10.0.0.7", False),
        ("2001:db8::1", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_an_address_is_this_machine_s_own_or_not(host: str, local: bool) -> None:
    assert is_local(host) == local
