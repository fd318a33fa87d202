"""What vLLM's own metrics do not tell, on its own `/metrics`: a stat logger, found by `vllm.stat_logger_plugins`.

vLLM calls `Metrics.record` in its API server once for every step of the engine. Names begin with `vqserve_`: what
begins with `vllm:` is vLLM's, and unregistered when it starts.
`vqserve_ops.monitoring.metrics` lists them for dashboards.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.buckets import histogram_buckets
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, MultiModalCacheStats, SchedulerStats

from vqserve.format.files import read_config
from vqserve.format.memory import ELEMENT_BYTES, Weights, expert_bytes, memory
from vqserve.vllm_plugin.counters import collector
from vqserve.vllm_plugin.linear import why_dequantized

CONCURRENCIES = {1: "1", 2: "2-3", 4: "4-7", 8: "8-15", 16: "16-31", 32: "32+"}
"""How many streams a step decodes at least, and what the metric calls that."""
SPEEDS = (1, 2, 4, 6, 8, 10, 12.5, 15, 17.5, 20, 25, 30, 35, 40, 50, 60, 70, 80, 90, 100, 125, 150, 200, 300, 500)
"""Tokens per second of one stream."""
SHARES = tuple(tenth / 10 for tenth in range(1, 11))
CAUSES = {
    FinishReason.STOP: "stop",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.REPETITION: "repetition",
}
LENGTHS = ("context_limit", "max_tokens")
"""What vLLM calls `length` for both."""
REFUSALS = ("context_limit", "invalid", "stopping")
"""Why a request was refused before it reached the engine."""

_LABELS = ("model_name", "engine")


class Metrics(AggregateStatLoggerBase):
    """Counts what every step of the engine did, and remembers when the last one was.

    Args:
        vllm_config: Of the engine, which is up already.
        engine_indexes: Engines that are told apart by the label `engine`.
        registry: Where the metrics are.

    Attributes:
        last_step: When the engine last finished a step, in seconds of the monotonic clock.
        last_token: When the last token came, or the engine was ready for the first.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_indexes: Sequence[int] = (0,),
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.last_step = self.last_token = time.monotonic()
        self._limit = vllm_config.model_config.max_model_len
        self._labels = [str(vllm_config.model_config.served_model_name), str(engine_indexes[0])]
        self._registry = registry
        _forget(registry)
        self._context = self._histogram(
            "vqserve_context_tokens",
            "Prompt and generated tokens of a finished request.",
            histogram_buckets("request_tokens", self._limit, vllm_config.observability_config.custom_histogram_buckets),
        )
        self._share = self._histogram(
            "vqserve_context_share", "The same as a share of the longest context that is served.", SHARES
        )
        speed = Histogram(
            "vqserve_stream_tokens_per_second",
            "Speed at which one stream decodes, by how many decode in the same step; a sample a step.",
            (*_LABELS, "concurrency"),
            buckets=SPEEDS,
            registry=registry,
        )
        self._speeds = {least: speed.labels(*self._labels, name) for least, name in CONCURRENCIES.items()}
        self._finished = self._counters(
            "vqserve_finished_requests",
            "Finished requests by cause; `context_limit` is a length that the context allowed no more of.",
            (*CAUSES.values(), *LENGTHS),
        )
        self._refused = self._counters(
            "vqserve_refused_requests", "Requests refused before they reached the engine, by cause.", REFUSALS
        )
        self._silence = self._gauge("vqserve_seconds_since_last_token", "0 unless requests are there to be answered.")
        limit = self._gauge("vqserve_context_limit_tokens", "The longest context that is served.")
        limit.set(self._limit)
        capacity = self._gauge(
            "vqserve_kv_cache_capacity_tokens", "Tokens of all contexts together that fit the KV cache."
        )
        capacity.set(kv_tokens(vllm_config))
        if nets := collector(self._labels[0], engine_indexes):
            registry.register(nets)
        self._weights(vllm_config)
        self._phases = Gauge(
            "vqserve_startup_seconds",
            "How long each phase of the start took: engine (loading), server, warm_up.",
            (*_LABELS, "phase"),
            registry=registry,
        )
        self._phase_ends = _process_start()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Takes note of one step. vLLM calls it for steps that finish no token, too."""
        self.last_step = time.monotonic()
        if iteration_stats is None:
            return
        if iteration_stats.num_generation_tokens:
            self.last_token = self.last_step
        if intervals := iteration_stats.inter_token_latencies_iter:
            self._decoded(intervals)
        for request in iteration_stats.finished_requests:
            tokens = request.num_prompt_tokens + request.num_generation_tokens
            self._context.observe(tokens)
            self._share.observe(tokens / self._limit)
            self._finished[cause_of(request, self._limit)].inc()

    def log_engine_initialized(self) -> None:
        """Ends the phase `engine`: vLLM calls it once weights are loaded, graphs captured and the KV cache is there."""
        self.end_phase("engine")

    def end_phase(self, phase: str) -> None:
        """Sets how long a phase of the start took, which began when the one before ended."""
        now = time.time()
        self._phases.labels(*self._labels, phase).set(now - self._phase_ends)
        self._phase_ends = now

    def watch(self, silence: Callable[[], float], status: Callable[[], str], statuses: Sequence[str]) -> None:
        """Has each scrape ask for what only the API server knows.

        Args:
            silence: Seconds since the last token, 0 if no request is there.
            status: The server's status, as `/ready` has it.
            statuses: All there are.
        """
        self._silence.set_function(silence)
        gauge = Gauge(
            "vqserve_server_status", "1 for the status that it has.", (*_LABELS, "status"), registry=self._registry
        )
        for each in statuses:
            gauge.labels(*self._labels, each).set_function(lambda each=each: float(status() == each))  # type: ignore[misc]

    def refused(self, cause: str) -> None:
        """Counts a request that was refused before it reached the engine: one of `REFUSALS`."""
        self._refused[cause].inc()

    def _decoded(self, intervals: Sequence[float]) -> None:
        """Streams of one step wait for the same step: their mean is the speed of each."""
        if (seconds := sum(intervals)) > 0:
            least = 1 << min(len(intervals).bit_length() - 1, 5)
            self._speeds[least].observe(len(intervals) / seconds)

    def _counters(self, name: str, documentation: str, causes: Sequence[str]) -> dict[str, Counter]:
        """A counter by cause, at 0 for each from the start."""
        made = Counter(name, documentation, (*_LABELS, "cause"), registry=self._registry)
        return {cause: made.labels(*self._labels, cause) for cause in causes}

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, _LABELS, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(name, documentation, _LABELS, buckets=buckets, registry=self._registry)
        return made.labels(*self._labels)

    def _weights(self, vllm_config: VllmConfig) -> None:
        gauge = Gauge(
            "vqserve_weights_bytes",
            "Weights that a rank holds, as computed from config.json; experts by the bits of their tier.",
            (*_LABELS, "rank", "part"),
            registry=self._registry,
        )
        for rank, parts in enumerate(weights_of_ranks(vllm_config)):
            for part, size in parts.items():
                gauge.labels(*self._labels, str(rank), part).set(size)


def cause_of(request: FinishedRequestStats, limit: int) -> str:
    """Why a request ended: what vLLM calls `length` is told apart."""
    if request.finish_reason != FinishReason.LENGTH:
        return CAUSES[request.finish_reason]
    full = request.num_prompt_tokens + request.num_generation_tokens >= limit
    return "context_limit" if full else "max_tokens"


def kv_tokens(vllm_config: VllmConfig) -> int:
    """Tokens that fit the KV cache of one rank, which holds every sequence whole."""
    cache = vllm_config.cache_config
    return cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size


def weights_of_ranks(vllm_config: VllmConfig) -> list[Mapping[str, int]]:
    """Bytes of weights by part, for each rank; nothing for what is no checkpoint in a folder."""
    folder = Path(vllm_config.model_config.model)
    if not folder.is_dir():
        return []
    config = read_config(folder)
    parallel, dtype = vllm_config.parallel_config, vllm_config.model_config.dtype
    ranks, whole = parallel.tensor_parallel_size, parallel.enable_expert_parallel
    assert isinstance(dtype, torch.dtype), "vLLM has resolved names of dtypes by now"
    dense = "GlmMoeDsaDenseForCausalLM" in vllm_config.model_config.architectures or current_platform.is_cpu()
    held: Weights = memory(
        config,
        ranks=ranks,
        attention="dense" if dense else "sparse",
        platform="cpu" if current_platform.is_cpu() else "cuda",
        whole_experts=whole,
        dequantized_spine=bool(why_dequantized(dtype)),
        element_bytes=dtype.itemsize if current_platform.is_cpu() else ELEMENT_BYTES,
        avx512=bool(torch.cpu.get_capabilities().get("avx512_f")),
    ).weights
    planes = ("experts: codes", "experts: refinement", "experts: scales")
    rest = Counts(held.split) + Counts(held.whole)
    for part in planes:
        del rest[part]
    tiers = [expert_bytes(config, rank, ranks, whole) for rank in range(ranks)]
    return [{f"experts: {bits:g} bit": size for bits, size in each.items()} | rest for each in tiers]


def _process_start() -> float:
    """When this process began, in seconds since the epoch, as prometheus_client's own collector has it."""
    found = REGISTRY.get_sample_value("process_start_time_seconds")
    return time.time() if found is None else found


def _forget(registry: CollectorRegistry) -> None:
    """Removes what an earlier engine of this process has registered, as vLLM does with its own."""
    for earlier, names in list(registry._collector_to_names.items()):
        if any(name.startswith("vqserve_") for name in names):
            registry.unregister(earlier)
