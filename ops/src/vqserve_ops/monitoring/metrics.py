"""Every metric that dashboards ask for: its name as Prometheus stores it, kind, unit, and who exports it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["vllm", "vqserve", "dcgm", "kube-state-metrics", "kubelet"]
Unit = Literal[
    "tokens", "requests", "seconds", "tokens/second", "bytes", "MiB", "bytes/second", "watts", "celsius", "percent",
    "share", "count", "flag", "code", "epoch seconds",
]  # fmt: skip

RELEASE_LABELS = ("namespace", "service", "pod")
"""What the chart's ServiceMonitor adds to each metric of an engine."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Of a counter with `_total`; of a histogram without `_bucket`, `_sum` and `_count`.
        kind: As its `TYPE` line has it.
        unit: Of its value; `share` is 0 to 1, `percent` 0 to 100, `flag` 0 or 1.
        source: `vllm` and `vqserve` are both on the engine's `/metrics`, behind the chart's ServiceMonitor.
        labels: Its own, which queries may name, without those that Prometheus adds.
    """

    name: str
    kind: Kind
    unit: Unit
    source: Source
    labels: tuple[str, ...] = ()

    def series(self) -> tuple[str, ...]:
        """Names that an expression may hold."""
        ends = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(self.name + end for end in ends)


def _vllm(name: str, kind: Kind, unit: Unit, *labels: str) -> Metric:
    return Metric(f"vllm:{name}", kind, unit, "vllm", ("model_name", "engine", *labels))


def _own(name: str, kind: Kind, unit: Unit, *labels: str) -> Metric:
    return Metric(f"vqserve_{name}", kind, unit, "vqserve", ("model_name", "engine", *labels))


def _dcgm(name: str, kind: Kind, unit: Unit) -> Metric:
    # The exporter also says which pod has the GPU, in `pod`; Prometheus renames that unless told to honour it.
    labels = ("Hostname", "gpu", "UUID", "namespace", "pod", "exported_namespace", "exported_pod")
    return Metric(f"DCGM_FI_{name}", kind, unit, "dcgm", labels)


def _kube(name: str, kind: Kind, unit: Unit, *labels: str) -> Metric:
    return Metric(f"kube_pod_{name}", kind, unit, "kube-state-metrics", ("namespace", "pod", *labels))


def _volume(name: str, unit: Unit) -> Metric:
    labels = ("namespace", "persistentvolumeclaim")
    return Metric(f"kubelet_volume_stats_{name}", "gauge", unit, "kubelet", labels)


def _cadvisor(name: str, kind: Kind, unit: Unit) -> Metric:
    return Metric(f"container_{name}", kind, unit, "kubelet", ("namespace", "pod", "container"))


METRICS = (
    _vllm("num_requests_running", "gauge", "requests"),
    _vllm("num_requests_waiting", "gauge", "requests"),
    _vllm("num_requests_waiting_by_reason", "gauge", "requests", "reason"),
    _vllm("kv_cache_usage_perc", "gauge", "share"),
    _vllm("prefix_cache_queries_total", "counter", "tokens"),
    _vllm("prefix_cache_hits_total", "counter", "tokens"),
    _vllm("num_preemptions_total", "counter", "count"),
    _vllm("prompt_tokens_total", "counter", "tokens"),
    _vllm("generation_tokens_total", "counter", "tokens"),
    _vllm("time_to_first_token_seconds", "histogram", "seconds"),
    _vllm("inter_token_latency_seconds", "histogram", "seconds"),
    _vllm("request_time_per_output_token_seconds", "histogram", "seconds"),
    _vllm("e2e_request_latency_seconds", "histogram", "seconds"),
    _vllm("request_queue_time_seconds", "histogram", "seconds"),
    _vllm("request_prefill_time_seconds", "histogram", "seconds"),
    _vllm("request_decode_time_seconds", "histogram", "seconds"),
    Metric("vllm:admission_rejections_total", "counter", "requests", "vllm", ("model_name", "reason")),
    # vLLM has it from prometheus-fastapi-instrumentator, which knows no model.
    Metric("http_requests_total", "counter", "requests", "vllm", ("handler", "method", "status")),
    _own("context_tokens", "histogram", "tokens"),
    _own("context_share", "histogram", "share"),
    _own("context_limit_tokens", "gauge", "tokens"),
    _own("kv_cache_capacity_tokens", "gauge", "tokens"),
    _own("stream_tokens_per_second", "histogram", "tokens/second", "concurrency"),
    _own("finished_requests_total", "counter", "requests", "cause"),
    _own("refused_requests_total", "counter", "requests", "cause"),
    _own("seconds_since_last_token", "gauge", "seconds"),
    _own("weights_bytes", "gauge", "bytes", "rank", "part"),
    _own("startup_seconds", "gauge", "seconds", "phase"),
    _own("server_status", "gauge", "flag", "status"),
    _own("thinking_closed_total", "counter", "count"),
    _own("anti_repetition_tokens_total", "counter", "tokens"),
    _dcgm("DEV_FB_USED", "gauge", "MiB"),
    _dcgm("DEV_FB_FREE", "gauge", "MiB"),
    _dcgm("DEV_POWER_USAGE", "gauge", "watts"),
    _dcgm("DEV_GPU_UTIL", "gauge", "percent"),
    _dcgm("DEV_MEM_COPY_UTIL", "gauge", "percent"),
    _dcgm("DEV_GPU_TEMP", "gauge", "celsius"),
    _dcgm("DEV_MEMORY_TEMP", "gauge", "celsius"),
    _dcgm("DEV_XID_ERRORS", "gauge", "code"),
    _dcgm("DEV_PCIE_REPLAY_COUNTER", "counter", "count"),
    _dcgm("PROF_DRAM_ACTIVE", "gauge", "share"),
    # Rates already, whatever the exporter's version calls their kind.
    _dcgm("PROF_PCIE_RX_BYTES", "gauge", "bytes/second"),
    _dcgm("PROF_PCIE_TX_BYTES", "gauge", "bytes/second"),
    _kube("container_status_restarts_total", "counter", "count", "container"),
    _kube("container_status_last_terminated_reason", "gauge", "flag", "container", "reason"),
    _kube("container_status_ready", "gauge", "flag", "container"),
    _kube("container_state_started", "gauge", "epoch seconds", "container"),
    _kube("spec_volumes_persistentvolumeclaims_info", "gauge", "flag", "volume", "persistentvolumeclaim"),
    _volume("available_bytes", "bytes"),
    _volume("capacity_bytes", "bytes"),
    _cadvisor("memory_working_set_bytes", "gauge", "bytes"),
    _cadvisor("cpu_usage_seconds_total", "counter", "seconds"),
)


def by_series(metrics: Iterable[Metric] = METRICS) -> dict[str, Metric]:
    """The metric behind each name that an expression may hold."""
    return {name: metric for metric in metrics for name in metric.series()}


DCGM_DEFAULTS = frozenset(
    f"DCGM_FI_{name}"
    for name in (
        "DEV_SM_CLOCK", "DEV_MEM_CLOCK",
        "DEV_MEMORY_TEMP", "DEV_GPU_TEMP",
        "DEV_POWER_USAGE", "DEV_TOTAL_ENERGY_CONSUMPTION",
        "DEV_PCIE_REPLAY_COUNTER",
        "DEV_GPU_UTIL", "DEV_MEM_COPY_UTIL", "DEV_ENC_UTIL", "DEV_DEC_UTIL",
        "DEV_XID_ERRORS",
        "DEV_FB_FREE", "DEV_FB_USED", "DEV_FB_RESERVED",
        "DEV_UNCORRECTABLE_REMAPPED_ROWS", "DEV_CORRECTABLE_REMAPPED_ROWS", "DEV_ROW_REMAP_FAILURE",
        "DEV_NVLINK_BANDWIDTH_TOTAL",
        "DEV_VGPU_LICENSE_STATUS",
        "PROF_GR_ENGINE_ACTIVE", "PROF_PIPE_TENSOR_ACTIVE", "PROF_DRAM_ACTIVE",
        "PROF_PCIE_TX_BYTES", "PROF_PCIE_RX_BYTES",
    )
)  # fmt: skip
"""What NVIDIA's dcgm-exporter exports unless told otherwise.

From `etc/default-counters.csv` of github.com/NVIDIA/dcgm-exporter at commit 7ad58324 (version 4.8). Those with PROF
take a datacenter GPU, whose profiling counters DCGM reads. Version 2 had PCIe's bytes as `DEV_PCIE_TX_THROUGHPUT` and
`DEV_PCIE_RX_THROUGHPUT`, in KB.
"""
