"""Reads files over HTTP: from a byte on, following redirects, with a token that goes to one host only."""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin, urlsplit

import certifi
import urllib3

from vqserve.format.errors import UsageError
from vqserve_ops import __version__
from vqserve_ops.errors import FailedError
from vqserve_ops.stage.sources import CHUNK, Address, InterruptedSourceError, Opened

TIMEOUT = urllib3.Timeout(connect=10, read=30)
"""Seconds; a source that says nothing for so long is asked again."""
_REDIRECTS = 5
_AGAIN = (408, 425, 429)
_RANGE = re.compile(r"bytes (?P<first>\d+)-\d+/(?P<total>\d+|\*)")
_LOCAL = ("127.0.0.1", "::1", "localhost")
_REMEDIES = {
    401: "the source wants a token: give one by --token-file",
    403: "the source refuses: check the token's rights, or the signature in the address and when it expires",
    404: "check the address: it is to be the folder that holds manifest.json",
    410: "check the address: what was there is gone",
}


class Web:
    """A folder behind a URL.

    Args:
        address: Where.
        token: What is sent as `Authorization: Bearer` to that very host; empty for none.
        parallel: Connections to keep.

    Raises:
        UsageError: A token would go over an unencrypted connection.
    """

    def __init__(self, address: Address, token: str, parallel: int) -> None:
        self._address = address
        self._token = token
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._parallel = parallel
        if token and urlsplit(address.base).scheme == "http" and urlsplit(address.base).hostname not in _LOCAL:
            raise UsageError(f"{address.shown}: a token would be readable on its way; give the https:// address")
        for scheme in ("http", "https"):
            self._pools[scheme] = self._pool(urllib.request.getproxies().get(scheme))
        self._direct = self._pool(None)

    @property
    def name(self) -> str:
        """The address without its query."""
        return self._address.shown

    def where(self, name: str) -> str:
        """The file's address without its query."""
        return self._address.base + name

    @contextmanager
    def open(self, name: str, offset: int, validator: str) -> Iterator[Opened]:
        """Asks for a file from `offset` on, if it still is what `validator` names."""
        headers = {"Accept-Encoding": "identity", "User-Agent": f"vqserve-ops/{__version__}"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator:
                headers["If-Range"] = validator
        try:
            response = self._follow(self._address.of(name), headers)
        except urllib3.exceptions.HTTPError as error:
            raise InterruptedSourceError(_said(error)) from error
        try:
            yield self._opened(name, offset, response)
        except (urllib3.exceptions.HTTPError, ConnectionError) as error:
            raise InterruptedSourceError(_said(error)) from error
        finally:
            response.close()  # a connection on which something is still to come cannot be used again

    def _opened(self, name: str, offset: int, response: urllib3.BaseHTTPResponse) -> Opened:
        status = response.status
        if status in _AGAIN or status >= 500:
            raise InterruptedSourceError(f"HTTP status {status}", _retry_after(response.headers))
        start = 0
        if status == 206:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            start = int(match["first"]) if match else -1
            if start != offset:
                raise RangeError("answered with another range than was asked for")
        elif status == 416:
            raise RangeError("has no such range")
        elif status != 200:
            remedy = _REMEDIES.get(status, "check the address")
            raise FailedError(f"{self.where(name)}: HTTP status {status}; {remedy}")
        return Opened(start, _validator(response.headers), _length(response.headers), _chunks(response))

    def _follow(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        home = _origin(url)
        for _ in range(_REDIRECTS + 1):
            own = {"Authorization": f"Bearer {self._token}"} if self._token and _origin(url) == home else {}
            response = self._pool_for(url).request(
                "GET", url, headers={**headers, **own}, redirect=False, retries=False, preload_content=False,
                decode_content=False, timeout=TIMEOUT,
            )  # fmt: skip
            target = response.headers.get("Location") if response.status in (301, 302, 303, 307, 308) else None
            if not target:
                return response
            response.close()
            before, url = url, urljoin(url, target)
            if urlsplit(url).scheme != "https" and urlsplit(url).scheme != urlsplit(before).scheme:
                raise FailedError(f"{_bare(before)}: redirects to an unencrypted address; give the final https:// one")
        raise FailedError(f"{_bare(url)}: more than {_REDIRECTS} redirects; give the address that they lead to")

    def _pool(self, proxy: str | None) -> urllib3.PoolManager:
        roots = os.environ.get("SSL_CERT_FILE") or certifi.where()
        if proxy:
            return urllib3.ProxyManager(proxy, maxsize=self._parallel, ca_certs=roots)
        return urllib3.PoolManager(maxsize=self._parallel, ca_certs=roots)

    def _pool_for(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        if urllib.request.proxy_bypass(parts.hostname or ""):
            return self._direct
        return self._pools[parts.scheme]


class RangeError(InterruptedSourceError):
    """The source cannot go on where a part ends: the file is to be fetched from its beginning."""


def _chunks(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    while chunk := response.read1(CHUNK, decode_content=False):
        yield chunk


def _validator(headers: Mapping[str, str]) -> str:
    """A strong validator for `If-Range`: a weak ETag must not stand there."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "") if not tag else ""


def _length(headers: Mapping[str, str]) -> int | None:
    said = headers.get("Content-Length", "")
    return int(said) if said.isdecimal() else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    said = headers.get("Retry-After", "")
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _bare(url: str) -> str:
    return urlsplit(url)._replace(query="", fragment="").geturl()


def _said(error: Exception) -> str:
    """What went wrong, without the address: that may hold a signature."""
    match error:
        case urllib3.exceptions.NameResolutionError():
            return "the host's name is not known"
        case urllib3.exceptions.NewConnectionError() | ConnectionRefusedError():
            return "nobody answers"
        case urllib3.exceptions.TimeoutError():
            return "the source says nothing"
        case urllib3.exceptions.SSLError():
            return "the connection's certificate is not trusted (SSL_CERT_FILE names other roots)"
        case urllib3.exceptions.ProxyError():
            return "the proxy fails"
    return "the connection broke"
