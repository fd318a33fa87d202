"""The script of `helm test`, against a server that only knows one answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from chart.helm import CHART

SCRIPT = CHART / "files" / "ask_a_sum.py"


class OneAnswer(HTTPServer):
    """Answers every request with `answer`, and keeps what it was asked with."""

    answer: str | None = "12+34=46\nThe answer is 46."

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: dict[str, object] = {}
        self.key: str | None = None


class _Handler(BaseHTTPRequestHandler):
    server: OneAnswer

    def do_POST(self) -> None:
        self.server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.key = self.headers["Authorization"]
        body = json.dumps({"choices": [{"message": {"content": self.server.answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[OneAnswer]:
    with OneAnswer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: OneAnswer, **variables: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    environment = {name: text for name, text in os.environ.items() if name != "VLLM_API_KEY"}
    environment |= {"URL": url, "MODEL": "glm-5.2", "NO_PROXY": "127.0.0.1"} | variables
    return subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)


def test_a_right_answer_passes(server: OneAnswer) -> None:
    done = ask(server)
    assert done.returncode == 0, done.stderr
    assert "The answer is 46." in done.stdout
    assert server.asked["model"] == "glm-5.2"
    assert server.key is None


@pytest.mark.parametrize("answer", ["The answer is 45.", "", None])
def test_a_wrong_answer_fails_and_is_shown(server: OneAnswer, answer: str | None) -> None:
    server.answer = answer
    done = ask(server)
    assert done.returncode == 1
    assert done.stderr == "expected 46\n"
    assert str(answer) in done.stdout


def test_the_key_is_shown_to_the_server(server: OneAnswer) -> None:
    assert ask(server, VLLM_API_KEY="secret").returncode == 0
    assert server.key == "Bearer secret"
