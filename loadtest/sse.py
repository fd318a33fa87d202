"""Server-sent events from bytes in pieces of any size, as the HTML standard has them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator


class Events:
    """Collects an event stream.

    A character, a CRLF or a field may be split anywhere. Comments and fields other than `data` are dropped; an event
    that the stream's end leaves open is not dispatched, and `open` tells of it.
    """

    def __init__(self) -> None:
        # A server that sends something else than UTF-8 is told from one that sends no JSON nowhere: both are garbage.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._data: list[str] = []
        self._after_cr = False
        self._first = True

    @property
    def open(self) -> bool:
        """Whether data has come that no empty line has ended."""
        return bool(self._data or self._rest)

    def feed(self, data: bytes) -> Iterator[str]:
        """The data of each event that these bytes end."""
        text = self._decoder.decode(data)
        if not text:
            return
        if self._first:
            text, self._first = text.removeprefix("\ufeff"), False
        if self._after_cr and text.startswith("\n"):
            text = text[1:]
        self._after_cr = text.endswith("\r") if text else False
        # Not splitlines(): it also splits at U+2028 and other characters that may stand unescaped in JSON.
        *lines, self._rest = (self._rest + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            if line:
                self._line(line)
            elif self._data:
                found, self._data = "\n".join(self._data), []
                yield found

    def _line(self, line: str) -> None:
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
