"""What a load test leaves: a JSON object per line, first the run, then what was sent and seen. Reports read no more.

Times of day are Unix seconds, durations seconds; fields are only ever added within a version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

VERSION = 1
"""Of the lines below. A reader refuses any other."""
COMPARED = ("model", "profile", "max_model_len", "sources")
"""Fields of a run that two must share to be compared: what was asked, and how."""


class Outcome(StrEnum):
    """How a request ended; all but `OK` are failures, each in exactly one class."""

    OK = "ok"
    OVER_CAP = "over_cap"
    """400: prompt and answer exceed the server's context."""
    INVALID = "invalid"
    """Any other 4xx: the request is wrong."""
    UNAUTHORIZED = "unauthorized"
    """401 or 403: the key is missing or wrong."""
    SHED = "shed"
    """429 or 503: the server, or what stands before it, declines for now."""
    SERVER_ERROR = "server_error"
    """Any other status that is not 200, or an error told of within the stream."""
    CONNECT = "connect"
    """No answer came: refused, unreachable, name or certificate wrong, closed before a status."""
    CUT = "cut"
    """The connection closed in the middle of a stream."""
    NO_DONE = "no_done"
    """The stream ended in order, without `[DONE]`."""
    GARBAGE = "garbage"
    """An event that is no JSON object of the API's form, or an answer that is no HTTP."""
    EMPTY = "empty"
    """A complete answer of zero tokens."""
    LENGTH = "length"
    """Ran into `max_tokens`, where the request did not ask for just that."""
    REPETITION = "repetition"
    """Ended by the server for repeating itself, or ran into `max_tokens` doing so."""
    TIMEOUT = "timeout"
    """Not complete in time."""
    NOT_SENT = "not_sent"
    """Due in an open loop, but the bound on requests under way was reached: the client, not the server, gave up."""


@dataclass(frozen=True)
class Run:
    """What was run, the first line of every process; two runs compare only if all of `COMPARED` agree.

    Attributes:
        run: Name of the run, the same in all its processes.
        started_at: Unix time.
        host: Address of the server.
        model: Name of the model asked.
        profile: The whole profile, as read.
        max_model_len: The server's cap in tokens; None if it did not say.
        sources: Processes that share an open loop's rate.
        source: Number of the process among them.
        server_version: As `/version` says; None if it does not.
        salt: What its prompts follow from beside the profile's seed.
        slo: What it was judged by, as `slo.Slo.parse` reads it; empty: by nothing.
    """

    run: str
    started_at: float
    host: str
    model: str
    profile: dict[str, Any]
    max_model_len: int | None
    sources: int = 1
    source: int = 0
    server_version: str | None = None
    salt: str = ""
    slo: str = ""

    @property
    def is_search(self) -> bool:
        """Whether it looks for the largest rate that keeps the SLO, and so has stages that break it."""
        return bool(self.profile["traffic"]["kind"] == "search")


@dataclass(frozen=True)
class Record:
    """One request.

    Attributes:
        id: Sent as `X-Request-Id`.
        stage: Which part of the traffic, e.g. `rate 4`.
        warm_up: To be left out of all results.
        kind: Which kind of prompt, e.g. `sum`, `needle 1024`, `over cap`.
        language: `en`, `ja`, `zh`; None for replayed prompts that name none.
        api: `chat` or `completions`.
        reasoning: Whether thinking was asked for; None if left to the server.
        sent_at: Unix time just before the connection is opened; when it was due, if it was not sent.
        outcome: The class it fell into.
        expected: The outcome that is right for it: `ok`, or `over_cap` for a deliberate one.
        detail: What went wrong, in words; empty if nothing.
        e2e_s: From `sent_at` to the end, whatever the end was.
        dispatch_lag_s: By how much it left later than the open loop's schedule said; None in a closed loop.
        client_lag_s: The longest that this process kept a ready greenlet waiting meanwhile: what timings may be off by.
        status: HTTP status; None if none came.
        retry_after_s: The server's wish, of a shed request.
        ttft_s: To the first non-empty reasoning or content; None if none came.
        first_content_s: To the first non-empty content.
        last_token_s: To the last chunk with text.
        gaps_s: Between one chunk with text and the next.
        gap_tokens: Tokens of the chunk that ended each gap; as long as `gaps_s`, or empty if the server does not count.
        tpot_s: (last - first chunk) / tokens after the first chunk; None with fewer than two chunks or without counts.
        prompt_tokens: From `usage`.
        completion_tokens: From `usage`; of a broken stream the last count that came.
        cached_tokens: Prompt tokens from the prefix cache, where the server says.
        reasoning_chars: Unicode characters of reasoning.
        content_chars: Unicode characters of content.
        finish_reason: As the server says.
        wanted_tokens: Prompt tokens aimed at, where a length was asked for.
        correct: Whether the content states the known answer; None if there is no complete answer or none is known.
    """

    id: str
    stage: str
    warm_up: bool
    kind: str
    language: str | None
    api: str
    reasoning: bool | None
    sent_at: float
    outcome: Outcome
    expected: Outcome = Outcome.OK
    detail: str = ""
    e2e_s: float = 0.0
    dispatch_lag_s: float | None = None
    client_lag_s: float | None = None
    status: int | None = None
    retry_after_s: float | None = None
    ttft_s: float | None = None
    first_content_s: float | None = None
    last_token_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    gap_tokens: tuple[int, ...] = ()
    tpot_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_chars: int = 0
    content_chars: int = 0
    finish_reason: str | None = None
    wanted_tokens: int | None = None
    correct: bool | None = None

    @property
    def good(self) -> bool:
        """Whether it ended as it should; a deliberate over-cap request is good if it is refused."""
        return self.outcome == self.expected


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment, beside the requests.

    Attributes:
        at: Unix time.
        of: `client` (this process), `server` (its `/metrics`) or `process` (one of this machine that is watched).
        values: By name, in the units that the names state.
    """

    at: float
    of: str
    values: dict[str, float]


@dataclass(frozen=True)
class Log:
    """What one process wrote down.

    Attributes:
        complete: It came to its end in order.
    """

    run: Run
    records: list[Record]
    samples: list[Sample]
    complete: bool = False


class RecordError(ValueError):
    """A line that is no record of this version; says file, line and what to do."""


class Writer:
    """Writes lines as they come, so that an end by any signal loses at most the line being written."""

    def __init__(self, path: Path, run: Run) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("x", encoding="utf-8", buffering=1)
        self._write({"type": "run", **asdict(run)})

    def write(self, line: Record | Sample) -> None:
        """Appends a request or a sample."""
        # Not `asdict`, which copies every gap: others' answers wait for this.
        self._write({"type": "request" if isinstance(line, Record) else "sample", **vars(line)})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps({"version": VERSION, **line}, ensure_ascii=False, separators=(",", ":"), default=str)
        self._file.write(text + "\n")

    def close(self, *, complete: bool = True) -> None:
        """Closes the file, and says in it whether all that was to come has come; a second time does nothing."""
        if complete and not self._file.closed:
            self._write({"type": "end"})
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read(path: Path) -> Log:
    """The lines of one process; a last one without its end, from a killed process, is left out.

    Raises:
        RecordError: The file is not one that `Writer` wrote.
    """
    log: Log | None = None
    for number, line in _lines(path):
        try:
            found = json.loads(line)
            if (version := found.pop("version")) != VERSION:
                raise RecordError(f"{path}:{number}: version {version}; this reads {VERSION}: use the release it is of")
            if (kind := found.pop("type")) == "run" and log is None:
                log = Log(run_of(found), [], [])
            elif kind == "request" and log is not None:
                log.records.append(record_of(found))
            elif kind == "sample" and log is not None:
                log.samples.append(sample_of(found))
            elif kind == "end" and log is not None:
                log = replace(log, complete=True)
            else:
                raise RecordError(
                    f"{path}:{number}: a line of type `{kind}` where none belongs; leave the file as written"
                )
        except (AttributeError, KeyError, TypeError, ValueError) as cause:
            if isinstance(cause, RecordError):
                raise
            raise RecordError(
                f"{path}:{number}: no record ({cause}); leave the file as the load test wrote it"
            ) from cause
    if log is None:
        raise RecordError(f"{path}: no line of type `run`; was it written by a load test?")
    return log


def read_all(folder: Path) -> list[Log]:
    """What the processes of one run wrote down, in the order of their numbers.

    A file without its first line is of one that is about to begin, or was killed then: as if it were not there.

    Raises:
        RecordError: There is nothing, or not of one run.
    """
    paths = [path for path in sorted(folder.glob("records-*.jsonl")) if next(_lines(path), None)]
    if not paths:
        raise RecordError(f"{folder}: holds no records-*.jsonl with a line; name the folder of a run")
    logs = sorted((read(path) for path in paths), key=lambda log: log.run.source)
    first = logs[0].run
    for log in logs[1:]:
        if (log.run.run, log.run.profile, log.run.model) != (first.run, first.profile, first.model):
            raise RecordError(f"{folder}: holds records of different runs; keep each in a folder of its own")
    return logs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield number, line


def run_of(found: dict[str, Any]) -> Run:
    """A run from its fields."""
    return Run(**_known(Run, found))


def sample_of(found: dict[str, Any]) -> Sample:
    """A sample from its fields."""
    return Sample(**_known(Sample, found))


def record_of(found: dict[str, Any]) -> Record:
    """A record from its fields, as JSON or a message between processes has them."""
    for name in ("outcome", "expected"):
        found[name] = Outcome(found[name])
    for name in ("gaps_s", "gap_tokens"):
        found[name] = tuple(found[name])
    return Record(**_known(Record, found))


def _known(kind: type[Any], found: dict[str, Any]) -> dict[str, Any]:
    # A later release of the same version may have added fields.
    known = {field.name for field in fields(kind)}
    return {name: value for name, value in found.items() if name in known}
