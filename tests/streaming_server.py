"""An OpenAI-like server for tests of load tests: streams tokens on a schedule, or a fault, by the model's name.

It runs in a process of its own: `python streaming_server.py [PORT]` prints its port. `GET /sent` tells when what
was sent.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

TOKENS, FIRST_S, GAP_S = 40, 0.1, 0.05
"""Of the model `schedule`: tokens of an answer, seconds to the first, and between two."""
CONTEXT = 4096
OVER_CAP = f"This model's maximum context length is {CONTEXT} tokens. However, you requested 5000 tokens."

Json = dict[str, Any]
SENT: dict[str, list[float]] = {}


def usage(completion: int, prompt: int = 7) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chunk(delta: Mapping[str, str], tokens: int, finish: str | None = None) -> Json:
    choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish, "token_ids": None}
    head = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "glm-5.2"}
    return {**head, "choices": [choice], "usage": usage(tokens)}


def event(data: Json | str, end: str = "\n\n") -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}{end}".encode()


class Stream:
    """One answer under way, in chunks of HTTP."""

    def __init__(self, writer: asyncio.StreamWriter, log: list[float]) -> None:
        self.writer, self.log = writer, log
        self.started = asyncio.get_running_loop().time()

    def start(self) -> None:
        self.writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    async def send(self, data: bytes) -> None:
        self.log.append(time.time())
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def answer(self, *texts: str, finish: str = "stop") -> None:
        for count, text in enumerate(texts, 1):
            await self.send(event(chunk({"content": text}, count)))
        await self.send(event(chunk({}, len(texts), finish)))

    async def done(self) -> None:
        await self.send(event({**chunk({}, 0), "choices": [], "usage": usage(3)}))
        await self.send(event("[DONE]"))

    def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")


async def plain(stream: Stream) -> None:
    await stream.send(event(chunk({"role": "assistant", "content": ""}, 0)))
    await stream.answer("The ", "answer is ", "42.")
    await stream.done()
    stream.end()


async def schedule(stream: Stream) -> None:
    loop = asyncio.get_running_loop()
    for index in range(TOKENS):
        await asyncio.sleep(stream.started + FIRST_S + index * GAP_S - loop.time())
        await stream.send(event(chunk({"content": "x"}, index + 1)))
    await stream.send(event(chunk({}, TOKENS, "stop")))
    await stream.send(event({**chunk({}, 0), "choices": [], "usage": usage(TOKENS)}))
    await stream.send(event("[DONE]"))
    stream.end()


async def cut(stream: Stream) -> None:
    await stream.send(event(chunk({"content": "half"}, 1)))


async def no_done(stream: Stream) -> None:
    await stream.answer("whole", " answer")
    stream.end()


async def garbage(stream: Stream) -> None:
    await stream.send(event(chunk({"content": "The"}, 1)))
    await stream.send(event('{"id": "chat'))
    await stream.done()
    stream.end()


async def parts(stream: Stream) -> None:
    """Content as a list of parts, as a chat's messages may have it and answers have not."""
    await stream.send(event(chunk({}, 1) | {"choices": [{"delta": {"content": [{"type": "text", "text": "42"}]}}]}))
    await stream.done()
    stream.end()


async def deep(stream: Stream) -> None:
    await stream.send(event("[" * 100_000))
    await stream.done()
    stream.end()


async def unpaired(stream: Stream) -> None:
    await stream.send(event(json.dumps({"error": {"message": "half of \ud83d", "code": 500}})))
    await stream.done()
    stream.end()


async def empty(stream: Stream) -> None:
    await stream.send(event(chunk({"role": "assistant", "content": ""}, 0)))
    await stream.send(event(chunk({}, 0, "stop")))
    await stream.send(event({**chunk({}, 0), "choices": [], "usage": usage(0)}))
    await stream.send(event("[DONE]"))
    stream.end()


async def reasoning_only(stream: Stream) -> None:
    for count, text in enumerate(("Let me ", "think ", "on"), 1):
        await stream.send(event(chunk({"reasoning": text}, count)))
    await stream.send(event(chunk({}, 3, "length")))
    await stream.done()
    stream.end()


async def reasoned(stream: Stream) -> None:
    await stream.send(event(chunk({"reasoning": "6×7"}, 1)))
    await asyncio.sleep(0.05)
    await stream.send(event(chunk({"content": "42"}, 3)))
    await stream.send(event(chunk({}, 3, "stop")))
    await stream.done()
    stream.end()


async def split(stream: Stream) -> None:
    """Every byte in a chunk of its own, with CRLF, a comment and a field that is no data between the events."""
    data = event(chunk({"content": "答えは４２"}, 2), "\r\n\r\n") + b": keep-alive\r\n\r\nevent: message\r\nid: 7\r\n"
    data += event(chunk({"content": "です。"}, 3), "\r\n\r\n")
    for byte in data:
        await stream.send(bytes([byte]))
    await stream.send(event(chunk({}, 3, "stop")))
    await stream.done()
    stream.end()


async def crlf(stream: Stream) -> None:
    """Lines end in CRLF, and the second of two tokens comes after 0.2 s."""
    end = "\r\n\r\n"
    await stream.send(event(chunk({"content": "4"}, 1), end))
    await asyncio.sleep(0.2)
    await stream.send(event(chunk({"content": "2"}, 2), end) + event(chunk({}, 2, "stop"), end) + event("[DONE]", end))
    stream.end()


async def long(stream: Stream) -> None:
    await stream.answer("one", " two", " three", finish="length")
    await stream.done()
    stream.end()


async def repetition(stream: Stream) -> None:
    await stream.answer("Well: ", *["and so on, "] * 20, finish="length")
    await stream.done()
    stream.end()


async def detected(stream: Stream) -> None:
    await stream.answer("so", " so", finish="repetition")
    await stream.done()
    stream.end()


async def failing(stream: Stream) -> None:
    await stream.send(event(chunk({"content": "half"}, 1)))
    await stream.send(event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}))
    await stream.send(event("[DONE]"))
    stream.end()


async def slow(stream: Stream) -> None:
    await stream.send(event(chunk({"content": "half"}, 1)))
    await asyncio.sleep(3600)


STREAMS: dict[str, Callable[[Stream], Awaitable[None]]] = {
    "plain": plain, "schedule": schedule, "cut": cut, "no-done": no_done, "garbage": garbage, "empty": empty,
    "reasoning-only": reasoning_only, "reasoned": reasoned, "split": split, "long": long, "repetition": repetition,
    "detected": detected, "failing": failing, "slow": slow, "parts": parts, "deep": deep, "unpaired": unpaired,
    "crlf": crlf,
}  # fmt: skip
REFUSALS: dict[str, tuple[int, str, str]] = {
    "over-cap": (400, OVER_CAP, ""),
    "invalid": (400, "temperature must be non-negative", ""),
    "missing": (404, "The model `missing` does not exist.", ""),
    "unauthorized": (401, "Unauthorized", ""),
    "shed-429": (429, "Too many requests", "7"),
    "shed-503": (503, "Draining", "2.5"),
    "broken": (500, "Internal Server Error", ""),
    "gateway": (502, "Bad Gateway", ""),
}


ODD: dict[str, Any] = {
    "/list/v1/models": [1],
    "/data/v1/models": {"data": {"id": "glm"}},
    "/words/v1/models": {"data": ["glm", {"id": 7}, {"name": "glm"}]},
    "/cap/v1/models": {"data": [{"id": "glm", "max_model_len": "long"}]},
}
"""What other servers may answer, by path."""


def respond(writer: asyncio.StreamWriter, status: int, body: Any, retry_after: str = "") -> None:
    data = json.dumps(body).encode()
    extra = f"Retry-After: {retry_after}\r\n" if retry_after else ""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{extra}\r\n"
    writer.write(head.encode() + data)


async def post(writer: asyncio.StreamWriter, path: str, headers: Mapping[str, str], body: Json) -> bool:
    """Answers; whether the connection may go on."""
    if path == "/tokenize":
        text = body.get("prompt", "")
        respond(writer, 200, {"count": len(text) // 2, "max_model_len": CONTEXT, "tokens": []})
        return True
    model = body["model"]
    if model in REFUSALS:
        status, message, retry_after = REFUSALS[model]
        respond(writer, status, {"error": {"message": message, "code": status}}, retry_after)
        return True
    stream = Stream(writer, SENT.setdefault(headers.get("x-request-id", ""), []))
    stream.start()
    await STREAMS[model](stream)
    return bool(model != "cut")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        going = True
        while going and (head := await reader.readuntil(b"\r\n\r\n")):
            lines = head.decode().split("\r\n")
            method, path, _ = lines[0].split(" ")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if method == "POST":
                going = await post(writer, path, headers, json.loads(body))
            else:
                models = {"data": [{"id": name, "max_model_len": CONTEXT} for name in STREAMS]}
                respond(writer, 200, SENT if path == "/sent" else ODD.get(path, models))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(port: int = 0) -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
