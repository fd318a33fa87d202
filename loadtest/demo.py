"""Serves the demo model and loads it: `python -m loadtest.demo plugin/demo/model --load-profile smoke`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.ports import free_port

START_S = 300.0
"""For the server to be ready: a minute on two idle cores."""
LOOK_S = 0.5


class DemoError(RuntimeError):
    """The server did not start; says why and where its log is."""


@contextmanager
def serving(model: Path, log: Path, *more: str) -> Iterator[tuple[str, int]]:
    """Serves a model on a free port, with `more` options, until left; its address and process.

    Raises:
        DemoError: It ended, or was not ready in time.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("vqserve")), "serve", str(model), "--port", str(port), *more]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A group of its own: Ctrl-C is for the load test, which then reports; the server is ended afterwards.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                raise DemoError(f"the server of {model} did not get ready ({last}); see {log}")
            time.sleep(LOOK_S)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def main() -> int:
    """The exit code of the load test; 2 if there was none."""
    parser = argparse.ArgumentParser("loadtest.demo", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--load-profile", default="smoke", help="as of the load test, like all options that follow")
    parser.add_argument("--records", type=Path, default=Path("build/loadtest"))
    parser.add_argument("--run-name", default="")
    options, more = parser.parse_known_args()
    run = options.run_name or time.strftime(f"demo-{Path(options.load_profile).stem}-%Y%m%d-%H%M%S", time.gmtime())
    folder = options.records / run
    sys.stderr.write("starting the demo's server; this takes a minute\n")
    locust = [sys.executable, "-m", "loadtest", "--headless", "--only-summary"]
    locust += ["--load-profile", options.load_profile, "--records", str(options.records)]
    try:
        with serving(options.model, options.records / f"{run}.server.log") as (url, pid):
            command = [*locust, "--run-name", run, "--host", url, "--watch-pid", str(pid), *more]
            code = _run(command)
    except DemoError as error:
        sys.stderr.write(f"loadtest: error: {error}\n")
        return 2
    page = (folder / "report.html").resolve()
    if page.is_file():
        sys.stdout.write(f"{page.as_uri()}\n")
        if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(page.as_uri())
    return code


def _run(command: list[str]) -> int:
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # the load test has it too, and reports before it ends


if __name__ == "__main__":
    sys.exit(main())
