"""`vqserve drain` asks this machine's server; what that does of it is tests/e2e/test_readiness.py's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from loadtest.ports import free_port
from vqserve.cli import main

Capture = pytest.CaptureFixture[str]


@contextmanager
def answering(body: bytes) -> Iterator[tuple[int, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_it_posts_to_drain_says_the_answer_and_waits_whatever_proxy_is_set(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("vqserve.drain.time.sleep", waited.append)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with answering(json.dumps({"status": "draining", "reason": "asked for"}).encode()) as (port, asked):
        assert main(["drain", "--port", str(port), "--wait", "7"]) == 0
    assert asked == ["/drain"]
    assert waited == [7]
    assert capsys.readouterr().out == "draining: asked for\n"


def test_no_server_is_one_line(capsys: Capture) -> None:
    port = free_port()
    assert main(["drain", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"127.0.0.1:{port}/drain" in error


def test_a_server_of_another_kind_is_one_line(capsys: Capture) -> None:
    with answering(b"[]") as (port, _):
        assert main(["drain", "--port", str(port)]) == 2
    assert "no server of vqserve's" in capsys.readouterr().err
