"""Ports for servers that are started to be tested or loaded."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

FROM, TO = 20_000, 30_000
"""Below those that Linux hands out (32768 and up), of which a client may get any, and has done so,
between the choice of a port and the moment, half a minute later, when the server listens on it."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    while True:
        port = random.SystemRandom().randrange(FROM, TO)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
