"""Whether the engine still moves: `GET /live`, and how many requests were refused.

vLLM's `/health` stays 200 while the engine hangs (vllm#39863). `/live` answers 503 if requests are there and the engine
has finished no step for `vqserve serve --stall-seconds`, so that Kubernetes restarts it. A step is not a token: long
prompts are computed in chunks, each a step, and a saturated engine steps all the time. An idle engine makes none, and
owes none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.v1.engine.async_llm import AsyncLLM

from vqserve.format.errors import UsageError
from vqserve.vllm_plugin.guard import is_probe
from vqserve.vllm_plugin.metrics import Metrics

_TOO_LONG = re.compile(rb"maximum context length|maximum model length|max_model_len|context length \(")
"""In what vLLM 0.32 says of a request that does not fit the context: `vllm/renderers/params.py` and its like."""
_BODY = 1 << 16


class Steps(Protocol):
    """When an engine last did something, in seconds of the monotonic clock."""

    last_step: float
    last_token: float


class Liveness:
    """Watches one engine.

    Args:
        steps: What its stat logger knows.
        arrivals: When each request came that is not finished, in seconds since the epoch, as vLLM has it.
        limit: Seconds of silence that are too many.
    """

    def __init__(self, steps: Steps, arrivals: Callable[[], Iterable[float]], limit: float) -> None:
        self.limit = limit
        self._steps, self._arrivals = steps, arrivals

    def since_step(self) -> float:
        """Seconds for which the engine has had requests and finished no step."""
        return self._since(self._steps.last_step)

    def since_token(self) -> float:
        """Seconds for which the engine has had requests and generated no token."""
        return self._since(self._steps.last_token)

    def is_stuck(self) -> bool:
        """Whether it has been silent for too long."""
        return self.since_step() > self.limit

    def _since(self, moment: float) -> float:
        arrivals = tuple(self._arrivals())
        if not arrivals:
            return 0.0
        return max(0.0, min(time.monotonic() - moment, time.time() - min(arrivals)))


class Refusals:
    """ASGI middleware: sees which requests are refused before they reach the engine, but for lack of a key.

    Those vLLM refuses further out; they are in its own `http_requests_total`.

    Args:
        app: What comes behind it.
        refused: Told the application and the cause of each.
    """

    def __init__(self, app: ASGIApp, refused: Callable[[FastAPI, str], None]) -> None:
        self._app, self._refused = app, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_probe(scope):
            await self._app(scope, receive, send)
            return
        status, body = 0, b""

        async def seen(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status == 400 and len(body) < _BODY:
                body += message.get("body", b"")
            await send(message)

        await self._app(scope, receive, seen)
        if cause := refusal(status, body):
            self._refused(scope["app"], cause)


def refusal(status: int, body: bytes) -> str | None:
    """Why a request was refused, from the answer to it; None if it was not."""
    if status == 400:
        return "context_limit" if _TOO_LONG.search(body) else "invalid"
    return "stopping" if status == 503 else None


def arrivals_of(engine: AsyncLLM) -> Callable[[], Iterable[float]]:
    """Asks vLLM when each unfinished request came."""
    states = engine.output_processor.request_states
    return lambda: (state.stats.arrival_time for state in states.values() if state.stats is not None)


def metrics_of(engine: AsyncLLM) -> Metrics:
    """The stat logger of an engine.

    Raises:
        UsageError: vLLM was told to load the one plugin without the other.
    """
    loggers = engine.logger_manager.stat_loggers if engine.logger_manager else ()
    found = next((each for each in loggers if isinstance(each, Metrics)), None)
    if found is None:
        raise UsageError("vLLM has not loaded the plugin vqserve-metrics; name it in VLLM_PLUGINS, or unset that")
    return found
