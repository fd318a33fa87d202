"""Makes everything of the demo model but its training: `make demo-model`, under 75 minutes on two cores.

Calibration text, an encoding for each budget, scores of the parent and of every encoding as they are served, and their
divergence from the parent. The smallest encoding that keeps enough becomes `model/`, with its scores in its card; the
table of all goes into README.md. What an interrupted run has finished is taken over: it lies in `build/demo-model`, an
encoding in a folder of its own, a result beside the digest of what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import write_calibration
from vqserve.evaluate.items import LANGUAGES
from vqserve.evaluate.needle import LENGTHS
from vqserve.evaluate.statistics import wilson

DEMO = Path(__file__).parent
ROOT = DEMO.parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- demo table: begin, written by `make demo-model` -->", "<!-- demo table: end -->"
BUDGETS = (1.9, 2.25, 2.5, 3.0)
"""Bits per routed-expert weight, scales included."""
EVALUATIONS = {
    "arithmetic": ["--per-language", "100"],
    "recall": ["--per-language", "50"],
    "needle": ["--per-length", "15"],
}
KEEPS_SUMS, KEEPS_NEEDLES, NEEDLES_UP_TO = 0.95, 0.9, 2048
"""Shares of the parent's score that the shipped encoding keeps: of sums in each language, and of short needles."""
VQSERVE = str(Path(sys.executable).with_name("vqserve"))
READY_SECONDS = 600


@dataclass(frozen=True)
class Measured:
    """One model and its results, as `vqserve eval --json` writes them, by task; `kl` is not among the parent's."""

    name: str
    nbytes: int
    results: Mapping[str, Mapping[str, Any]]

    def rows(self, task: str, mode: str, groups: Sequence[str]) -> list[Mapping[str, Any]]:
        """The score rows of these groups."""
        return [row for row in self.results[task]["scores"] if row["mode"] == mode and row["group"] in groups]

    def right(self, task: str, groups: Sequence[str]) -> float:
        """How many answers are right, with thinking and without."""
        rows = [row for mode in ("thinking", "direct") for row in self.rows(task, mode, groups)]
        return float(sum(row["right"] * row["items"] for row in rows))


def keeps_enough(model: Measured, parent: Measured) -> bool:
    """Whether a served encoding is good enough to ship."""
    sums = all(
        model.right("arithmetic", [language]) >= KEEPS_SUMS * parent.right("arithmetic", [language])
        for language in LANGUAGES
    )
    return sums and model.right("needle", short()) >= KEEPS_NEEDLES * parent.right("needle", short())


def short() -> list[str]:
    """The groups of needles whose texts are short enough to be asked of a shipped model."""
    return [f"{length} tokens" for length in LENGTHS if length <= NEEDLES_UP_TO]


def table(models: Sequence[Measured]) -> str:
    """Markdown: a column per model, the parent first; shares with their 95 % intervals."""
    lines = [["", *(model.name for model in models)]]
    lines.append(["bytes", *(f"{model.nbytes:,}" for model in models)])
    lines.append(["KL from the parent, nats per answer token", *map(_divergence, models)])
    for name, task, groups in (
        ("sums", "arithmetic", ["all"]),
        ("facts", "recall", ["all"]),
        (f"needles up to {NEEDLES_UP_TO} tokens", "needle", short()),
        (f"needles at {LENGTHS[-1]} tokens", "needle", [f"{LENGTHS[-1]} tokens"]),
    ):
        for mode in ("thinking", "direct"):
            cells = [_share(model.rows(task, mode, groups)) for model in models]
            lines.append([f"{name}, {mode}", *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _divergence(model: Measured) -> str:
    if "kl" not in model.results:
        return "0"
    row = model.results["kl"]["kl"]["all"]
    return f"{row['mean']:.4f} ({row['low']:.4f}-{row['high']:.4f})"


def _share(rows: Sequence[Mapping[str, Any]]) -> str:
    items = sum(row["items"] for row in rows)
    right = round(sum(row["right"] * row["items"] for row in rows))
    low, high = wilson(right, items)
    return f"{right / items:.1%} ({low:.1%}-{high:.1%})"


def with_table(readme: str, text: str) -> str:
    """The README with its table replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"README.md has lost its line {BEGIN}"
    assert end, f"README.md has lost its line {END}"
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "demo-model", help="default: build/demo-model")
    make(parser.parse_args().build)


def make(build: Path) -> None:
    """Encodes, measures, chooses and puts everything in its place."""
    try:
        build.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise SystemExit(f"--build {build}: cannot be made: {cause.strerror}; name another folder") from cause
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{(time.monotonic() - started) / 60:5.1f} min] {text}", flush=True)

    parent, calibration = DEMO / "parent", build / "calibration.jsonl"
    write_calibration(calibration)
    folders = {bits: build / f"{bits}" for bits in BUDGETS}
    for bits, folder in folders.items():
        if not (folder / "manifest.json").is_file():
            say(f"encoding at {bits} bits")
            run("encode", parent, folder, "--bits", bits, "--calibration", calibration, "--work", build / "work",
                "--base-model", "vqserve-demo")  # fmt: skip
    measured = [measure("parent, bf16", parent, build / "results", say)]
    measured += [measure(f"{bits:g} bits", folder, build / "results", say) for bits, folder in folders.items()]
    chosen = next((at for at, model in enumerate(measured[1:]) if keeps_enough(model, measured[0])), None)
    if chosen is None:
        raise SystemExit("no encoding keeps enough of the parent's scores: the results are in build/demo-model/results")
    folder, model = list(folders.values())[chosen], measured[1:][chosen]
    shipped = Path(shutil.copytree(folder, build / "model", dirs_exist_ok=True))
    run("card", shipped, "--scores", *(result(build / "results", folder, task) for task in (*EVALUATIONS, "kl")))
    run("verify", shipped)
    shutil.rmtree(DEMO / "model", ignore_errors=True)
    shutil.copytree(shipped, DEMO / "model")
    shutil.rmtree(shipped)
    shutil.copyfile(calibration, DEMO / "calibration.jsonl")
    README.write_text(with_table(README.read_text(encoding="utf-8"), table(measured)), encoding="utf-8")
    say(f"plugin/demo/model is the encoding at {model.name}; README.md has the table")


def measure(name: str, folder: Path, results: Path, say: Callable[[str], None]) -> Measured:
    """Serves a model and asks it everything that has no result yet."""
    results.mkdir(exist_ok=True)
    is_parent = folder == DEMO / "parent"
    todo = [task for task in EVALUATIONS if not result(results, folder, task).is_file()]
    if todo:
        with serving(folder, results / f"{folder.name}.log", *(["--bf16"] if is_parent else [])) as url:
            for task in todo:
                say(f"{name}: {task}")
                against = [] if is_parent else ["--against", result(results, DEMO / "parent", task)]
                ask(results, folder, task, url, *EVALUATIONS[task], *against)
    if not is_parent and not result(results, folder, "kl").is_file():
        say(f"{name}: kl")
        ask(results, folder, "kl", folder, DEMO / "parent")
    tasks = [*EVALUATIONS] if is_parent else [*EVALUATIONS, "kl"]
    found = {task: json.loads(result(results, folder, task).read_text(encoding="utf-8")) for task in tasks}
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Measured(name, nbytes, found)


def result(results: Path, folder: Path, task: str) -> Path:
    """Where the result of a task is kept: under the digest of the weights that were measured."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return results / f"{folder.name}-{digest.hexdigest()[:12]}-{task}.json"


def ask(results: Path, folder: Path, task: str, *arguments: object) -> None:
    """Runs one evaluation; its result appears whole or not at all."""
    path = result(results, folder, task)
    unfinished = path.with_suffix(".unfinished")
    run("eval", task, *arguments, "--json", unfinished)
    unfinished.replace(path)


def run(*arguments: object) -> None:
    """Runs a subcommand of vqserve; its output is the user's to see."""
    done = subprocess.run([VQSERVE, *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """A served model's address, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [VQSERVE, "serve", str(folder), "--port", str(port), *options], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until_ready(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Waits until the warm-up is over."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except urllib.error.HTTPError as answer:
            if json.load(answer)["status"] != "warming up":
                break
        except OSError:
            if process.poll() is not None:
                break
        time.sleep(0.5)
    raise SystemExit(f"{url} did not become ready; the server's log is {log}")


if __name__ == "__main__":
    main()
