"""A streaming client of the OpenAI API under gevent that takes the time of every chunk.

geventhttpclient, because it distorts least: 200 streams of 20 chunks a second cost it 0.44 s of CPU time for 8,000
chunks, urllib3 0.40 s and httpx 2.18 s. Spread evenly, TTFT was off by 0.1, 0.1 and 1.1 ms in the median; with all 200
connections opened at once by 1, 630 and 1,110 ms. (One run each, Python 3.11, gevent 26.9, on two cores that others
used too: the order holds, and the CPU times; the tails belong to the others as well.)

Every request has a connection of its own. Servers close idle ones (vLLM after 5 s), at times just as a request goes
out, and a POST must not be sent twice: kept connections would count failures that no user sees. TTFT holds the connect.
"""

from __future__ import annotations

import email.utils
import json
import re
import ssl
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal
from urllib.parse import urlsplit

import gevent
import gevent.ssl
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError, HTTPSocketResponse

from loadtest.answer import Answer, Broken, outcome_of_status
from loadtest.lag import LagMonitor
from loadtest.prompts import Prompt
from loadtest.records import Outcome, Record
from loadtest.sse import Events

CONNECT_S = 10.0
"""Seconds for a connection to open."""

Api = Literal["chat", "completions"]


@dataclass(frozen=True)
class Options:
    """How prompts are sent.

    Attributes:
        api: `chat` or `completions`.
        max_tokens: Most tokens of an answer.
        reasoning: Whether to think; None leaves it to the server.
        temperature: Of sampling; 0 is greedy.
        ignore_eos: Go on until `max_tokens`: answers of equal length, for measuring alone.
        timeout_s: Seconds for a whole request.
    """

    api: Api = "chat"
    max_tokens: int = 256
    reasoning: bool | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Place:
    """Where in the traffic a request stands: fields of `Record`."""

    stage: str = ""
    warm_up: bool = False
    dispatch_lag_s: float | None = None


class Client:
    """Asks one server.

    Args:
        host: Its address, e.g. `http://127.0.0.1:8001`; a path before `/v1` is kept.
        model: Name of the model to ask.
        key: API key, sent as a bearer; None sends none.
        host_header: Name to ask for where `host` is the address of an ingress.
        lag: Watches this process, to record by how much timings may be off.

    Attributes:
        model: As above; may be changed.
        tokens: Of all answers so far, as they come.

    Raises:
        ValueError: `host` is no such address.
    """

    def __init__(
        self,
        host: str,
        model: str,
        *,
        key: str | None = None,
        host_header: str | None = None,
        lag: LagMonitor | None = None,
    ) -> None:
        url = urlsplit(host)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{host}: expected an address such as http://127.0.0.1:8001")
        self.model = model
        self.tokens = 0
        self._base = url.path.rstrip("/").removesuffix("/v1")
        self._lag = lag
        headers = {"Accept": "text/event-stream, application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        headers |= {"Host": host_header} if host_header else {}
        self._headers = headers
        secure = url.scheme == "https"
        self._address = url.hostname, url.port or (443 if secure else 80)
        self._secure = secure
        # An ingress chooses the certificate by this name, and the certificate is of this name.
        self._tls_name = urlsplit(f"//{host_header}").hostname if host_header else url.hostname

    def _http(self) -> HTTPClient:
        """A pool for one request: whatever the server says of keeping connections, it is closed with it."""
        return HTTPClient(
            *self._address,
            connection_timeout=CONNECT_S,
            # The whole request has its own limit. One per socket would cost a timer for every piece that it waits for.
            network_timeout=None,  # type: ignore[arg-type]
            ssl=self._secure,
            ssl_context_factory=_tls if self._secure else None,
            ssl_options={"server_hostname": self._tls_name} if self._secure else None,
        )

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What a route answers in JSON: GET, or POST of a body; None unless it answers 200 with JSON."""
        answer = self.get(path, body)
        try:
            return None if answer is None else json.loads(answer)
        except (ValueError, RecursionError):
            return None

    def models(self) -> dict[str, int | None]:
        """The models that the server lists, with their caps in tokens; None where it does not say."""
        answer = self.call("/v1/models")
        listed = answer.get("data") if isinstance(answer, dict) else None
        found: dict[str, int | None] = {}
        for model in listed if isinstance(listed, list) else []:
            if isinstance(model, dict) and isinstance(name := model.get("id"), str):
                cap = model.get("max_model_len")
                found[name] = cap if type(cap) is int and cap > 0 else None
        return found

    def version(self) -> str | None:
        """The server's version, where it says."""
        answer = self.call("/version")
        version = answer.get("version") if isinstance(answer, dict) else None
        return version if isinstance(version, str) else None

    def get(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 30.0) -> bytes | None:
        """What a route answers: GET, or POST of a body; None unless it answers 200 in time."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        try:
            with gevent.Timeout(timeout_s, TimeoutError), closing(self._http()) as http:
                response = http.request("POST" if data else "GET", self._base + path, data, headers)
                text: bytes = response.read()
                return text if response.status_code == 200 else None
        except (OSError, HTTPParseError):
            return None

    def ask(self, prompt: Prompt, options: Options, place: Place = Place()) -> Record:
        """Sends one request and follows its answer to the end; never raises for what the server does."""
        answer, body = Answer(), self._body(prompt, options)
        began_at, began = time.time(), time.perf_counter()
        record = Record(
            id=uuid.uuid4().hex,
            stage=place.stage,
            warm_up=place.warm_up,
            kind=prompt.kind,
            language=prompt.language,
            api=options.api,
            reasoning=options.reasoning,
            sent_at=began_at,
            outcome=Outcome.OK,
            expected=prompt.expected,
            dispatch_lag_s=place.dispatch_lag_s,
            wanted_tokens=prompt.wanted_tokens,
        )
        try:
            with gevent.Timeout(options.timeout_s, _TookTooLong), closing(self._http()) as http:
                record = self._follow(http, record, answer, body, options)
        except _TookTooLong:
            record = replace(record, outcome=Outcome.TIMEOUT, detail=f"not complete after {options.timeout_s:g} s")
        return self._measured(record, answer, prompt, began)

    def _body(self, prompt: Prompt, options: Options) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.max_tokens or options.max_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if options.api == "chat":
            body["messages"] = [{"role": message.role, "content": message.content} for message in prompt.messages]
            if options.reasoning is not None:
                body["chat_template_kwargs"] = {"enable_thinking": options.reasoning}
        else:
            body["prompt"] = prompt.text
        if options.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body, ensure_ascii=False).encode()

    def _follow(self, http: HTTPClient, record: Record, answer: Answer, body: bytes, options: Options) -> Record:
        path = f"{self._base}/v1/{'chat/completions' if options.api == 'chat' else 'completions'}"
        headers = {**self._headers, "Content-Type": "application/json", "X-Request-Id": record.id}
        try:
            response = http.request("POST", path, body, headers)
        except (OSError, HTTPParseError) as error:
            closed = not isinstance(error, HTTPParseError) or "connection closed" in str(error)
            outcome = Outcome.CONNECT if closed or isinstance(error, HTTPConnectionClosed) else Outcome.GARBAGE
            return replace(record, outcome=outcome, detail=_words(error))
        with response:
            record = replace(record, status=response.status_code)
            try:
                if response.status_code != 200:
                    return _refused(record, response)
                self._stream(response, answer)
                answer.judge(length_wanted=options.ignore_eos)
            except Broken as broken:
                return replace(record, outcome=broken.outcome, detail=broken.detail)
            except (OSError, HTTPParseError) as error:
                return replace(record, outcome=Outcome.CUT, detail=_words(error))
        return record

    def _stream(self, response: HTTPSocketResponse, answer: Answer) -> None:
        events, end = Events(), b"\n"
        # Lines, and not blocks of bytes: a block is handed out only when it is full.
        while not answer.done and (piece := response.readline(end)):
            now, before = time.perf_counter(), answer.completion_tokens or 0
            for data in events.feed(piece):
                answer.add(data, now)
            self.tokens += (answer.completion_tokens or 0) - before
            if piece == b"\n":  # and not CRLF, so that from now on a piece is an event
                end = b"\n\n"
        if not answer.done:
            for data in events.feed(response.read()):
                answer.add(data, time.perf_counter())

    def _measured(self, record: Record, answer: Answer, prompt: Prompt, began: float) -> Record:
        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - began

        return replace(
            record,
            detail=_writable(record.detail),
            e2e_s=time.perf_counter() - began,
            client_lag_s=self._lag.worst_since(began) if self._lag else None,
            ttft_s=since(answer.first),
            first_content_s=since(answer.first_content),
            last_token_s=since(answer.last),
            gaps_s=tuple(answer.gaps),
            gap_tokens=tuple(answer.gap_tokens) if len(answer.gap_tokens) == len(answer.gaps) else (),
            tpot_s=answer.tpot,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
            reasoning_chars=sum(map(len, answer.reasoning)),
            content_chars=len(answer.text),
            finish_reason=answer.finish_reason and _writable(answer.finish_reason),
            correct=prompt.is_right(answer.text) if record.outcome == Outcome.OK else None,
        )


class _TookTooLong(BaseException):
    """A limit on the whole request; no Exception, so that nothing on the way takes it for its own."""


def _refused(record: Record, response: HTTPSocketResponse) -> Record:
    text = response.read().decode("utf-8", "replace")
    try:
        found = json.loads(text)
        message = str(found["error"]["message"] if "error" in found else found.get("message", text))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        message = text
    outcome = outcome_of_status(response.status_code, message)
    wait = _retry_after(response.get("retry-after")) if outcome == Outcome.SHED else None
    return replace(record, outcome=outcome, detail=message[:200], retry_after_s=wait)


def _retry_after(value: str | list[str] | None) -> float | None:
    """Seconds of a Retry-After, given in seconds or as a date."""
    if not isinstance(value, str):
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _writable(text: str) -> str:
    """A server's words without lone surrogates, which JSON can state and no file in UTF-8 can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


@cache
def _tls() -> ssl.SSLContext:
    # One for all connections: reading the certificates takes tens of milliseconds, in which no greenlet runs.
    context: ssl.SSLContext = gevent.ssl.create_default_context()
    return context
