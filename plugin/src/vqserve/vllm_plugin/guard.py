"""The API key, asked for on every route but the probes.

vLLM's own check looks at paths that begin with /v1, /v2, /inference or /cohere. The model can be asked in other places
too: /invocations, /generative_scoring, /tokenize, /scale_elastic_ep, the development routes, and whatever the next
version adds. So this one names what stays open, and everything else wants the key.
"""

from __future__ import annotations

from argparse import Namespace

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

PROBES = frozenset({"ready", "live", "drain", "health", "ping", "metrics", "version", "load"})
"""First parts of the paths that look at the server and ask no model; `/drain` serves this machine's clients only."""


class Guard:
    """ASGI middleware: answers requests that show no key with 401, wherever they go but to a probe.

    Args:
        app: What comes behind it.
        tokens: Keys, any of which will do. They are compared by vLLM's own check, in constant time.
    """

    def __init__(self, app: ASGIApp, tokens: list[str]) -> None:
        self._app = app
        self._knows = AuthenticationMiddleware(app, tokens).verify_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # As in vLLM's check, OPTIONS passes: browsers ask so, without a key, whether they may send one.
        is_request = scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS"
        if is_request and not is_probe(scope) and not self._knows(Headers(scope=scope)):
            await _refusal()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def keys_of(args: Namespace) -> list[str]:
    """The keys of a server, none if it is open to everybody: `--api-key`, else `VLLM_API_KEY`, as vLLM reads them."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def is_probe(scope: Scope) -> bool:
    """Whether a request looks at the server and asks no model."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).lstrip("/").partition("/")[0] in PROBES


def _refusal() -> JSONResponse:
    message = "this server wants its API key; send it as `Authorization: Bearer KEY`"
    error = {"message": message, "type": "AuthenticationError", "param": None, "code": 401}
    return JSONResponse({"error": error}, 401, {"WWW-Authenticate": "Bearer"})
