"""A web server that holds a checkpoint and, on request, misbehaves as real ones do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Site:
    """What it holds and does.

    Attributes:
        files: Content by name, below /folder/.
        faults: By name, what to do instead of answering well, one after another; then it answers well.
        ranges: Whether it knows of ranges.
        rate: Bytes at a time, with a pause of 10 ms after each; 0 for all at once.
        asked: Every request: name, headers, query.
        sent: Bytes of content sent, by name.
    """

    files: dict[str, bytes]
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    ranges: bool = True
    rate: int = 0
    port: int = 0
    asked: list[tuple[str, dict[str, str], str]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/folder/"


Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.name = parts.path.rpartition("/")[2]
        self.site.asked.append((self.name, dict(self.headers), parts.query))
        content = self.site.files.get(self.name)
        if content is None:
            return self.refuse(404)
        faults = self.site.faults.get(self.name, [])
        if faults:
            return faults.pop(0)(self, content)
        return self.answer(content)

    def refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content: bytes, *, length: int | None = None, cut: int | None = None) -> None:
        """Answers, saying another length, or breaking off after `cut` bytes of what was asked for."""
        tag = f'"{hash(content):x}"'
        first = 0
        asked = self.headers.get("Range", "")
        if self.site.ranges and asked and self.headers.get("If-Range", tag) == tag:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
        body = content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.send(body[:cut])
        if cut is not None or length is not None:
            self.close_connection = True

    def send(self, body: bytes) -> None:
        step = self.site.rate or max(len(body), 1)
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            self.site.sent[self.name] += len(piece)
            if self.site.rate:
                threading.Event().wait(0.01)

    def log_message(self, *_: object) -> None:
        pass


def drop(after: int) -> Fault:
    return lambda handler, content: handler.answer(content, cut=after)


def status(code: int, **headers: str) -> Fault:
    return lambda handler, _: handler.refuse(code, **headers)


def lie(length: int) -> Fault:
    return lambda handler, content: handler.answer(content, length=length)


def other(content: bytes) -> Fault:
    return lambda handler, _: handler.answer(content)


def endless(handler: Handler, _: bytes) -> None:
    """Sends for ever, without saying how much."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    for _piece in range(10_000):
        try:
            handler.wfile.write(bytes(1 << 16))
        except OSError:
            break
    handler.close_connection = True


class QuietServer(ThreadingHTTPServer):
    """Does not mind who hangs up."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    site.port = server.server_port
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
