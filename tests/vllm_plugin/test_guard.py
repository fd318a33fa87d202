"""Which routes of vLLM's own application ask for the API key; that they answer with it see e2e."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient, WebSocketDenialResponse
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_plugin.test_readiness import right
from vqserve.installation import PLUGINS
from vqserve.vllm_plugin.guard import PROBES
from vqserve.vllm_plugin.readiness import Readiness

KEY = "a-key"
SHOWN = {"Authorization": f"Bearer {KEY}"}
METHODS = ("GET", "POST", "PUT", "DELETE")


def app_of(monkeypatch: pytest.MonkeyPatch, *arguments: str, **variables: str) -> FastAPI:
    """vLLM's application with our endpoint plugin, built as its server builds it; there is no engine behind it."""
    for name, value in {"VLLM_PLUGINS": ",".join(PLUGINS), **variables}.items():
        monkeypatch.setenv(name, value)
    parser = make_arg_parser(FlexibleArgumentParser())
    app = build_app(parser.parse_args(["--model", "none", *arguments]), ("generate",))
    app.state.vqserve_readiness = Readiness(Path(), right, lambda: False)
    return app


def answers(app: FastAPI, headers: dict[str, str]) -> dict[tuple[str, str], int]:
    """Status of every route, by method and path, if asked with these headers."""
    client = TestClient(app, raise_server_exceptions=False)
    return {(method, path): client.request(method, path, headers=headers).status_code for method, path in routes(app)}


def routes(app: FastAPI) -> Iterable[tuple[str, str]]:
    for route in app.routes:
        for method in getattr(route, "methods", None) or METHODS:
            yield method, getattr(route, "path", "")


@pytest.fixture(params=["0", "1"], ids=["production", "development"])
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """The application with a key, without and with vLLM's development routes."""
    return app_of(monkeypatch, "--api-key", KEY, VLLM_SERVER_DEV_MODE=request.param)


def test_every_route_but_the_probes_wants_the_key(guarded: FastAPI) -> None:
    found = answers(guarded, {})
    assert {"/invocations", "/tokenize", "/generative_scoring", "/scale_elastic_ep"} <= {path for _, path in found}
    for (method, path), status in found.items():
        is_probe = path.split("/")[1] in PROBES
        assert (status != 401) == is_probe, f"{method} {path}: {status}"


def test_no_route_refuses_the_key(guarded: FastAPI) -> None:
    assert 401 not in answers(guarded, SHOWN).values()


@pytest.mark.parametrize(
    "path", ["/unknown", "//invocations", "/metrics2", "/readyx", "/", "/INVOCATIONS", "/x/health", "/openapi.json"]
)
def test_a_path_that_resembles_a_probe_wants_the_key_like_any_other(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(app_of(monkeypatch, "--api-key", KEY))
    answer = client.post(path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]


def test_a_server_under_a_path_of_its_own_guards_the_same_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(app_of(monkeypatch, "--api-key", KEY, "--root-path", "/glm"), raise_server_exceptions=False)
    for prefix in ("", "/glm"):
        assert client.get(f"{prefix}/version").status_code == 200
        assert client.post(f"{prefix}/tokenize").status_code == 401


@pytest.mark.parametrize("shown", ["", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xff"])
def test_what_is_not_the_key_is_refused(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(app_of(monkeypatch, "--api-key", KEY))
    assert client.post("/tokenize", headers={b"Authorization": shown.encode("latin-1")}).status_code == 401


def test_a_websocket_wants_the_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(app_of(monkeypatch, "--api-key", KEY))
    with pytest.raises(WebSocketDenialResponse) as refusal, client.websocket_connect("/realtime"):
        pass
    assert refusal.value.status_code == 401


def test_any_of_several_keys_opens_and_the_environments_does_where_no_option_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opens(app: FastAPI, key: str) -> bool:
        client = TestClient(app, raise_server_exceptions=False)
        return client.post("/detokenize", headers={"Authorization": f"Bearer {key}"}).status_code != 401

    named = app_of(monkeypatch, "--api-key", "one", "two", VLLM_API_KEY="three")
    assert [opens(named, key) for key in ("one", "two", "three")] == [True, True, False]
    assert opens(app_of(monkeypatch, VLLM_API_KEY="three"), "three")
    assert not opens(app_of(monkeypatch, VLLM_API_KEY="three"), "one")


def test_without_a_key_every_route_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert 401 not in answers(app_of(monkeypatch), {}).values()
