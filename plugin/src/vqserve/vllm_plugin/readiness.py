"""Whether this server wants requests: `GET /ready`, `POST /drain`, and what becomes of requests while it stops.

Also `GET /live`, whether it has to be restarted: see `liveness`.

`/ready` answers 200, or 503 with one of these statuses and a reason in plain words:

| status | when | new requests |
|---|---|---|
| `warming up` | until every known answer has come | served |
| `ready` (200) | from then on | served |
| `refused` | for good, after a wrong answer, or a warm-up that failed or took too long | served |
| `engine dead` | vLLM's engine process is gone, and soon the server | vLLM's affair |
| `stuck` | while the engine has requests and has finished no step for `--stall-seconds` | served |
| `draining` | from `POST /drain` on, which only clients on this machine may send | served |
| `draining` | from SIGTERM or SIGINT on: running requests are finished, then the server ends | 503 |

No such path wants the API key: probes have none (`guard` asks for it elsewhere). `/drain` is there because a load
balancer takes seconds to follow `/ready`: whoever stops a server asks for the drain, waits that long, and then sends
SIGTERM.

All that vLLM is told of is an endpoint plugin. It adds the routes and an ASGI middleware; that sees the server start,
when vLLM has registered its signal handlers, and chains ours before them. The warm-up asks the object that vLLM's own
route for chat completions asks, so it needs neither API key nor port nor certificate. What is known here is known of
one API server process; `vqserve serve` starts only one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.logger import init_logger
from vllm.tasks import SupportedTask
from vllm.v1.engine.async_llm import AsyncLLM

from vqserve.format.errors import CheckpointError, UsageError
from vqserve.format.known_answers import KnownAnswer, read_known_answers
from vqserve.settings import stall_seconds, thinking_budget, warm_up_seconds
from vqserve.vllm_plugin.guard import Guard, is_probe, keys_of
from vqserve.vllm_plugin.liveness import Liveness, Refusals, arrivals_of, metrics_of
from vqserve.vllm_plugin.nets import ARGUMENT
from vqserve.vllm_plugin.tracing import send_earlier
from vqserve.vllm_plugin.warm_up import Ask, Reply, WarmUpError, warm_up

STATUSES = ("warming up", "ready", "refused", "engine dead", "stuck", "draining")
_RETRY_SECONDS = 5

logger = init_logger("vllm.vqserve")  # vLLM prints what is logged under its own name, and nothing else


class Log(Protocol):
    """What is told of a server's start and its requests."""

    def end_phase(self, phase: str) -> None:
        """A phase of the start is over: `server` or `warm_up`."""

    def refused(self, cause: str) -> None:
        """A request was refused before it reached the engine."""


class Readiness:
    """What is known of one API server: how its warm-up went, whether it drains, whether it stops.

    Args:
        folder: The checkpoint, which may hold known answers.
        ask: Has the engine answer a prompt.
        is_dead: Whether the engine is gone.
        is_stuck: Whether it has been silent for too long.
        log: Told what becomes of the start and of requests.
    """

    def __init__(
        self,
        folder: Path,
        ask: Ask,
        is_dead: Callable[[], bool],
        is_stuck: Callable[[], bool] = lambda: False,
        log: Log | None = None,
    ) -> None:
        self.stopping = False
        self._folder, self._ask, self._is_dead, self._is_stuck = folder, ask, is_dead, is_stuck
        self._log = log
        self._draining = False
        self._state = ("warming up", "the server is starting")
        self._warm_up: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins the warm-up, and listens to the signals that stop a server. In the event loop of the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._listen(number)
        self._tell_phase("server")
        self._warm_up = asyncio.create_task(self._run())

    def drain(self) -> None:
        """Makes the server not ready for good; it serves on."""
        logger.info("drain asked for: /ready answers 503 from now on")
        self._draining = True

    def state(self) -> tuple[str, str]:
        """Status and reason, as `/ready` gives them."""
        if self.stopping:
            return "draining", "the server is stopping: it finishes running requests and takes no new ones"
        if self._draining:
            return "draining", "a drain was asked for: the server still serves, and is about to be stopped"
        return self.failure() or self._state

    def failure(self) -> tuple[str, str] | None:
        """Status and reason, as `/live` gives them, if only a restart can help."""
        if self._is_dead():
            return "engine dead", "vLLM's engine process has ended; the server's log says why"
        if self._is_stuck():
            return "stuck", "the engine has requests and has finished no step for longer than --stall-seconds"
        return None

    def refused(self, cause: str) -> None:
        """Takes note of a request that was refused before it reached the engine."""
        if self._log is not None:
            self._log.refused(cause)

    def _tell_phase(self, phase: str) -> None:
        if self._log is not None:
            self._log.end_phase(phase)

    def _listen(self, number: signal.Signals) -> None:
        """Puts our handler before vLLM's, which a loop's own `add_signal_handler` would replace."""
        loop, previous = asyncio.get_running_loop(), signal.getsignal(number)
        assert callable(previous), f"vLLM has no handler for {number.name}"

        def stop(received: int, frame: FrameType | None) -> None:
            self.stopping = True
            if self._warm_up is not None:
                loop.call_soon_threadsafe(self._warm_up.cancel)
            previous(received, frame)

        signal.signal(number, stop)
        signal.siginterrupt(number, False)  # as event loops set it

    async def _run(self) -> None:
        started = time.monotonic()
        try:
            answers = read_known_answers(self._folder)
            await self._ask_in_time(answers)
        except (CheckpointError, WarmUpError) as error:
            self._refuse(str(error))
        except Exception as error:
            logger.exception("warm-up failed")
            self._refuse(f"the warm-up failed: {type(error).__name__}: {error}")
        else:
            came = f"{len(answers)} known answers came" if answers else "the checkpoint has no known answers"
            logger.info("ready: %s, warm-up took %.1f s", came, time.monotonic() - started)
            self._tell_phase("warm_up")
            self._state = ("ready", came)

    async def _ask_in_time(self, answers: Sequence[KnownAnswer]) -> None:
        try:
            seconds = warm_up_seconds()
        except UsageError as error:
            raise WarmUpError(str(error)) from error
        try:
            async with asyncio.timeout(seconds):
                await warm_up(self._ask, answers, self._report)
        except TimeoutError as error:
            problem = f"the warm-up was not over after {seconds:g} s: {self._state[1]}"
            raise WarmUpError(f"{problem}; --warm-up-seconds allows more") from error

    def _report(self, done: int, prompts: int) -> None:
        self._state = ("warming up", f"{done} of {prompts} warm-up prompts are answered")

    def _refuse(self, reason: str) -> None:
        logger.error("not ready, for good: %s", reason)
        self._state = ("refused", reason)


class Gate:
    """ASGI middleware: begins the warm-up when the server starts, and refuses requests once it stops."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        readiness = _of(scope["app"])
        if scope["type"] == "lifespan":
            readiness.start()
        elif readiness.stopping and not is_probe(scope):
            await _refusal(readiness.state()[1])(scope, receive, send)
            return
        await self._app(scope, receive, send)


class ReadinessPlugin:
    """vLLM's `EndpointPlugin`."""

    name = "vqserve-readiness"
    required_tasks: tuple[SupportedTask, ...] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(Gate)
        if keys := keys_of(app.state.args):
            app.add_middleware(Guard, tokens=keys)
        app.add_middleware(Refusals, refused=lambda app, cause: _of(app).refused(cause))
        app.add_api_route("/ready", ready, methods=["GET"])
        app.add_api_route("/live", live, methods=["GET"])
        app.add_api_route("/drain", drain, methods=["POST"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        send_earlier()
        # Only a server of the task `render` has none.
        assert isinstance(engine_client, AsyncLLM)
        engine, metrics = engine_client, metrics_of(engine_client)
        liveness = Liveness(metrics, arrivals_of(engine), stall_seconds())
        readiness = Readiness(
            Path(engine.model_config.model),
            _asking(state),
            lambda: engine.errored,
            liveness.is_stuck,
            metrics,
        )
        metrics.watch(liveness.since_token, lambda: readiness.state()[0], STATUSES)
        state.vqserve_readiness = readiness


async def ready(request: Request) -> JSONResponse:
    """200 if the server wants requests, 503 and why if it does not."""
    status, reason = _of(request.app).state()
    return JSONResponse({"status": status, "reason": reason}, 200 if status == "ready" else 503)


async def live(request: Request) -> JSONResponse:
    """503 and why if only a restart can help, else 200."""
    failure = _of(request.app).failure()
    status, reason = failure or ("alive", "the engine is idle, or moves")
    return JSONResponse({"status": status, "reason": reason}, 503 if failure else 200)


async def drain(request: Request) -> JSONResponse:
    """Makes `/ready` answer 503 from now on. Only for clients on this machine: there is no key to show."""
    if request.client is None or not is_local(request.client.host):
        return JSONResponse({"error": "only clients on the server's own machine may ask for a drain"}, 403)
    readiness = _of(request.app)
    readiness.drain()
    status, reason = readiness.state()
    return JSONResponse({"status": status, "reason": reason})


def is_local(host: str) -> bool:
    """Whether an address is this machine's own, also an IPv4 one in IPv6's clothes."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _asking(state: State) -> Ask:
    async def ask(prompt: KnownAnswer) -> Reply:
        request = ChatCompletionRequest.model_validate(
            {
                "messages": prompt.messages,
                "chat_template_kwargs": prompt.chat_template_kwargs,
                "max_tokens": prompt.max_tokens,
                "temperature": 0.0,
                # The answers are the weights' own: no safety net shall have a part in them.
                "thinking_token_budget": prompt.max_tokens if thinking_budget() else None,
                "vllm_xargs": {ARGUMENT: 0.0},
            }
        )
        answer = await state.openai_serving_chat.create_chat_completion(request)
        if isinstance(answer, ErrorResponse):
            raise WarmUpError(f"the server refused a warm-up prompt: {answer.error.message}")
        [choice] = answer.choices
        return Reply(choice.message.content or "", choice.message.reasoning or "", str(choice.finish_reason))

    return ask


def _of(app: FastAPI) -> Readiness:
    readiness: Readiness = app.state.vqserve_readiness
    return readiness


def _refusal(reason: str) -> JSONResponse:
    """What OpenAI's clients take for a server to come back to, on a new connection and so perhaps to another server."""
    error = {"message": reason, "type": "ServiceUnavailableError", "param": None, "code": 503}
    headers = {"Retry-After": str(_RETRY_SECONDS), "Connection": "close"}
    return JSONResponse({"error": error}, 503, headers)
