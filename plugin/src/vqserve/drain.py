"""`vqserve drain`: has the server on this machine answer 503 at `/ready`; it serves on until it is stopped."""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request

from vqserve.arguments import positive
from vqserve.format.errors import UsageError

_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve drain`."""
    parser.add_argument("--port", type=positive, default=8001, metavar="PORT", help="default: %(default)s")
    parser.add_argument(
        "--wait", type=positive, metavar="SECONDS", help="return so much later: load balancers take time to follow"
    )


def run(args: argparse.Namespace) -> int:
    """Asks for the drain, and waits.

    Raises:
        UsageError: There is no such server on this machine.
    """
    url = f"http://127.0.0.1:{args.port}/drain"
    try:
        # `drain` is asked of this machine alone, whatever proxy there is for others.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, method="POST"), timeout=_SECONDS) as answer:
            state = json.load(answer)
        print(f"{state['status']}: {state['reason']}", flush=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UsageError(f"{url}: no server of vqserve's answers there ({problem}); name its port by --port") from error
    if args.wait is not None:
        time.sleep(args.wait)
    return 0
