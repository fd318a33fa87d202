"""What is seen beside the requests: this process, the server's own metrics, and a process of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gevent
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtest.client import Client
from loadtest.lag import LagMonitor
from loadtest.records import Sample

PERIOD_S = 2.0
SUMS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_cache_queried_tokens",
    "vllm:prefix_cache_hits_total": "prefix_cache_hit_tokens",
    "process_resident_memory_bytes": "resident_bytes",
}
"""Series of vLLM, and the name of their sum over labels."""
MOSTS = {"vllm:kv_cache_usage_perc": "kv_cache_share"}
"""Series, and the name of the largest; it is a share in spite of its name."""


def server_values(text: str) -> dict[str, float]:
    """What a server's `/metrics` says of itself; nothing, if it is not of Prometheus's form."""
    wanted = tuple(SUMS | MOSTS)
    # A server has thousands of lines, and parsing them would keep greenlets waiting.
    lines = [line for line in text.split("\n") if line.startswith(wanted)]
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                if name := SUMS.get(sample.name):
                    found[name] = found.get(name, 0.0) + sample.value
                elif name := MOSTS.get(sample.name):
                    found[name] = max(found.get(name, 0.0), sample.value)
    except ValueError:
        return {}
    return found


def resident_bytes(process: psutil.Process) -> int:
    """Of a process and its children; 0 if it is gone."""
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.Error:
        pass
    return total


class Watch:
    """Takes samples every `PERIOD_S` in a greenlet of its own.

    Args:
        emit: Takes each.
        lag: Watches this process's greenlets.
        server: Its client and the path of its metrics; None leaves it alone.
        pid: A process of this machine to be watched with its children; None: none.

    Raises:
        psutil.NoSuchProcess: There is no such process.
    """

    def __init__(
        self,
        emit: Callable[[Sample], None],
        lag: LagMonitor,
        server: tuple[Client, str] | None = None,
        pid: int | None = None,
    ) -> None:
        self._emit, self._lag, self._server = emit, lag, server
        self._own = psutil.Process()
        self._other = None if pid is None else psutil.Process(pid)
        self._greenlet: gevent.Greenlet[[], None] | None = None

    def start(self) -> None:
        """Begins."""
        self._greenlet = gevent.spawn(self._go)

    def stop(self) -> None:
        """Ends, with a last sample of this machine."""
        if self._greenlet is not None:
            self._greenlet.kill()
            self._greenlet = None
            for sample in self._here():
                self._emit(sample)

    def _go(self) -> None:
        before, used = time.perf_counter(), self._cpu_s()
        for sample in self._here():
            self._emit(sample)
        while True:
            gevent.sleep(PERIOD_S)
            now, cpu = time.perf_counter(), self._cpu_s()
            share, lag = (cpu - used) / (now - before), self._lag.worst_since(before) or 0.0
            before, used = now, cpu
            for sample in self._here(cpu_share=share, lag_s=lag):
                self._emit(sample)
            if self._server is not None:
                client, path = self._server
                text = client.get(path, timeout_s=PERIOD_S)
                if text is not None and (values := server_values(text.decode("utf-8", "replace"))):
                    self._emit(Sample(time.time(), "server", values))

    def _here(self, **more: float) -> Iterator[Sample]:
        yield Sample(time.time(), "client", {"resident_bytes": self._own.memory_info().rss, **more})
        if self._other is not None and (resident := resident_bytes(self._other)):
            yield Sample(time.time(), "process", {"resident_bytes": resident})

    def _cpu_s(self) -> float:
        times = self._own.cpu_times()
        return float(times.user + times.system)
