"""Every question that the dashboards ask, once.

Rates and quantiles are taken over Grafana's `$__rate_interval`, which is four scrapes at least. What the engine exports
is found by namespace, Service and model; what others export about its pods, by their names: the Deployment is called as
the Service is.
"""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.models import units

from vqserve_ops.monitoring.promql import containers_of, exported, filled_in, pods_of, scraped

ENGINE = scraped("$namespace", "$release")
MODEL = ENGINE + ',model_name=~"$model_name"'
PODS = pods_of("$namespace", "$release")
CONTAINER = containers_of(PODS)

TOKENS_PER_SECOND = "suffix: tok/s"
REQUESTS_PER_SECOND = units.RequestsPerSecond
EVENTS_PER_SECOND = "suffix: /s"
TOKENS = "suffix: tok"
CORES = "suffix: cores"


@dataclass(frozen=True)
class Query:
    """A question to Prometheus.

    Attributes:
        name: How tests call it.
        expr: PromQL with Grafana's variables.
        unit: Of the result, as Grafana names it.
        legend: What a series is called, with its labels as `{{label}}`.
        gpu_only: Whether it has an answer only on nodes with NVIDIA GPUs.
    """

    name: str
    expr: str
    unit: str
    legend: str
    gpu_only: bool = False


def instant(
    query: Query,
    window: str = "5m",
    *,
    namespace: str = "default",
    release: str = "glm-vqserve",
    model_name: str = ".*",
    ttft: str = "5.0",
    tpot: str = "0.1",
    e2e: str = "60.0",
) -> str:
    """The query's expression as Prometheus itself takes it.

    Args:
        query: Which one.
        window: What `$__rate_interval` becomes, a Prometheus duration.
        namespace: The release's.
        release: Its Service.
        model_name: A regular expression.
        ttft: A bound of the histogram of times to the first token, as its label `le` has it.
        tpot: The same for the time per output token.
        e2e: The same for whole requests.
    """
    values = {
        "__rate_interval": window,
        "namespace": namespace,
        "release": release,
        "model_name": model_name,
        "ttft": ttft,
        "tpot": tpot,
        "e2e": e2e,
    }
    return filled_in(query.expr, values)


def _rate(metric: str, match: str = MODEL) -> str:
    return f"rate({metric}{{{match}}}[$__rate_interval])"


def _quantile(name: str, histogram: str, quantile: float) -> Query:
    percent = f"{quantile * 100:g}"
    expr = f"histogram_quantile({quantile:g}, sum by (le) ({_rate(histogram + '_bucket')}))"
    return Query(f"{name}_p{percent}", expr, units.Seconds, f"p{percent}")


def _quantiles(name: str, histogram: str) -> tuple[Query, Query, Query]:
    return (
        _quantile(name, histogram, 0.5),
        _quantile(name, histogram, 0.95),
        _quantile(name, histogram, 0.99),
    )


def _buckets(name: str, histogram: str) -> Query:
    expr = f"sum by (le) (increase({histogram}_bucket{{{MODEL}}}[$__rate_interval]))"
    return Query(name, expr, units.Short, "{{le}}")


def _mean(name: str, histogram: str, legend: str) -> Query:
    expr = f"sum({_rate(histogram + '_sum')}) / sum({_rate(histogram + '_count')})"
    return Query(name, expr, units.Seconds, legend)


def _under(histogram: str, variable: str) -> str:
    within = f'{MODEL},le="${variable}"'
    return f"sum({_rate(histogram + '_bucket', within)}) / sum({_rate(histogram + '_count')})"


def _gpu(name: str, metric: str, unit: str, legend: str, function: str = "{}") -> Query:
    """By GPU; with both names that the engine's pod may have, as Prometheus honours the exporter's labels or not."""
    window = "" if function == "{}" else "[$__rate_interval]"
    ways = [function.format(f"{metric}{{{match}}}{window}") for match in (PODS, exported(PODS))]
    expr = f"max by (Hostname, gpu) ({' or '.join(ways)})"
    return Query(name, expr, unit, legend, gpu_only=True)


# Overview
STATUS = Query(
    "status", f"max by (pod, status) (vqserve_server_status{{{MODEL}}}) == 1", units.NoUnit, "{{pod}}: {{status}}"
)
REPLICAS = Query("replicas_by_status", f"sum by (status) (vqserve_server_status{{{MODEL}}})", units.Short, "{{status}}")
SILENCE = Query(
    "seconds_since_last_token", f"max by (pod) (vqserve_seconds_since_last_token{{{MODEL}}})", units.Seconds, "{{pod}}"
)
GENERATED = Query("generated", f"sum({_rate('vllm:generation_tokens_total')})", TOKENS_PER_SECOND, "generated")
PROMPT = Query("prompt", f"sum({_rate('vllm:prompt_tokens_total')})", TOKENS_PER_SECOND, "prompt")
TTFT = _quantiles("ttft", "vllm:time_to_first_token_seconds")
ITL = _quantiles("itl", "vllm:inter_token_latency_seconds")
RUNNING = Query("running", f"sum(vllm:num_requests_running{{{MODEL}}})", units.Short, "running")
WAITING = Query("waiting", f"sum(vllm:num_requests_waiting{{{MODEL}}})", units.Short, "waiting")
WAITING_WHY = Query(
    "waiting_by_reason",
    f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{MODEL}}})",
    units.Short,
    "{{reason}}",
)
REFUSED = Query(
    "refused", f"sum by (cause) ({_rate('vqserve_refused_requests_total')})", REQUESTS_PER_SECOND, "{{cause}}"
)
REJECTED = Query(
    "rejected",
    f"sum by (reason) ({_rate('vllm:admission_rejections_total')})",
    REQUESTS_PER_SECOND,
    "queue limit: {{reason}}",
)
FAILED = Query(
    "failed",
    "sum by (cause) ({})".format(_rate("vqserve_finished_requests_total", MODEL + ',cause=~"abort|error"')),
    REQUESTS_PER_SECOND,
    "{{cause}}",
)
RESPONSES = Query(
    "responses",
    "sum by (status) ({})".format(_rate("http_requests_total", ENGINE + ',handler=~"/v1/.*"')),
    REQUESTS_PER_SECOND,
    "{{status}}",
)

# Context
CONTEXT_SHARE = _buckets("context_share", "vqserve_context_share")
CONTEXT_TOKENS = _buckets("context_tokens", "vqserve_context_tokens")
CONTEXT_LIMIT = Query("context_limit", f"max(vqserve_context_limit_tokens{{{MODEL}}})", TOKENS, "cap")
CONTEXT_P95 = Query(
    "context_p95",
    f"histogram_quantile(0.95, sum by (le) ({_rate('vqserve_context_tokens_bucket')}))",
    TOKENS,
    "p95 of finished requests",
)
NEAR_LIMIT = Query(
    "context_near_limit",
    "1 - sum({}) / sum({})".format(
        _rate("vqserve_context_share_bucket", MODEL + ',le="0.9"'), _rate("vqserve_context_share_count")
    ),
    units.PercentUnit,
    "over 90 % of the cap",
)
KV_USAGE = Query("kv_usage", f"max by (pod) (vllm:kv_cache_usage_perc{{{MODEL}}})", units.PercentUnit, "{{pod}}")
KV_CAPACITY = Query("kv_capacity", f"sum(vqserve_kv_cache_capacity_tokens{{{MODEL}}})", TOKENS, "capacity")
KV_USED = Query(
    "kv_used",
    f"sum(vllm:kv_cache_usage_perc{{{MODEL}}} * vqserve_kv_cache_capacity_tokens{{{MODEL}}})",
    TOKENS,
    "in use",
)
PREEMPTIONS = Query("preemptions", f"sum({_rate('vllm:num_preemptions_total')})", EVENTS_PER_SECOND, "preemptions")
OVER_LIMIT = Query(
    "refused_over_limit",
    "sum({})".format(_rate("vqserve_refused_requests_total", MODEL + ',cause="context_limit"')),
    REQUESTS_PER_SECOND,
    "refused: over the cap",
)
CUT_OFF = Query(
    "cut_off_by_limit",
    "sum({})".format(_rate("vqserve_finished_requests_total", MODEL + ',cause="context_limit"')),
    REQUESTS_PER_SECOND,
    "answers that ended at the cap",
)
PREFIX_HITS = Query(
    "prefix_cache_hit_rate",
    f"sum({_rate('vllm:prefix_cache_hits_total')}) / sum({_rate('vllm:prefix_cache_queries_total')})",
    units.PercentUnit,
    "hit rate",
)

# Quality of service
_GOOD = {
    "ttft": _under("vllm:time_to_first_token_seconds", "ttft"),
    "tpot": _under("vllm:request_time_per_output_token_seconds", "tpot"),
    "e2e": _under("vllm:e2e_request_latency_seconds", "e2e"),
}
GOOD_TTFT = Query("good_ttft", _GOOD["ttft"], units.PercentUnit, "first token within $ttft s")
GOOD_TPOT = Query("good_tpot", _GOOD["tpot"], units.PercentUnit, "each further token within $tpot s")
GOOD_E2E = Query("good_e2e", _GOOD["e2e"], units.PercentUnit, "whole answer within $e2e s")
# Histograms do not say which requests met several thresholds. If shares a, b and c met one each, those that met all are
# at least a + b + c - 2, and at most the least of them.
GOODPUT = Query(
    "goodput_at_least",
    "clamp_min({} - 2, 0)".format(" + ".join(_GOOD.values())),
    units.PercentUnit,
    "all three, at least",
)
TPOT = _quantiles("tpot", "vllm:request_time_per_output_token_seconds")
E2E = _quantiles("e2e", "vllm:e2e_request_latency_seconds")
QUEUE_TIME = _mean("mean_queue_time", "vllm:request_queue_time_seconds", "waiting")
PREFILL_TIME = _mean("mean_prefill_time", "vllm:request_prefill_time_seconds", "prefill")
DECODE_TIME = _mean("mean_decode_time", "vllm:request_decode_time_seconds", "decode")
FINISHED = Query(
    "finished", f"sum by (cause) ({_rate('vqserve_finished_requests_total')})", REQUESTS_PER_SECOND, "{{cause}}"
)
_SPEED = f"sum by (le, concurrency) ({_rate('vqserve_stream_tokens_per_second_bucket')})"
SPEED = Query("stream_speed_p50", f"histogram_quantile(0.5, {_SPEED})", TOKENS_PER_SECOND, "{{concurrency}} at once")
SPEED_LOW = Query(
    "stream_speed_p5", f"histogram_quantile(0.05, {_SPEED})", TOKENS_PER_SECOND, "{{concurrency}} at once"
)
THINKING_CLOSED = Query(
    "thinking_closed", f"sum({_rate('vqserve_thinking_closed_total')})", EVENTS_PER_SECOND, "thinking closed"
)
ANTI_REPETITION = Query(
    "anti_repetition",
    f"sum({_rate('vqserve_anti_repetition_tokens_total')})",
    EVENTS_PER_SECOND,
    "tokens kept from repeating",
)

# GPUs
_CARD = "{{Hostname}} GPU {{gpu}}"
GPU_USED = _gpu("gpu_memory_used", "DCGM_FI_DEV_FB_USED", units.Mebibytes, _CARD)
GPU_FREE = _gpu("gpu_memory_free", "DCGM_FI_DEV_FB_FREE", units.Mebibytes, _CARD)
GPU_POWER = _gpu("gpu_power", "DCGM_FI_DEV_POWER_USAGE", units.Watt, _CARD)
GPU_BUSY = _gpu("gpu_utilisation", "DCGM_FI_DEV_GPU_UTIL", units.Percent, _CARD)
GPU_COPY = _gpu("gpu_memory_utilisation", "DCGM_FI_DEV_MEM_COPY_UTIL", units.Percent, _CARD)
GPU_DRAM = _gpu("gpu_dram_active", "DCGM_FI_PROF_DRAM_ACTIVE", units.PercentUnit, _CARD)
GPU_TEMPERATURE = _gpu("gpu_temperature", "DCGM_FI_DEV_GPU_TEMP", units.Celsius, _CARD)
GPU_MEMORY_TEMPERATURE = _gpu("gpu_memory_temperature", "DCGM_FI_DEV_MEMORY_TEMP", units.Celsius, _CARD + " memory")
GPU_XID = _gpu("gpu_xid", "DCGM_FI_DEV_XID_ERRORS", units.NoUnit, _CARD)
GPU_RX = _gpu("pcie_rx", "DCGM_FI_PROF_PCIE_RX_BYTES", units.BytesPerSecondSI, _CARD + " in")
GPU_TX = _gpu("pcie_tx", "DCGM_FI_PROF_PCIE_TX_BYTES", units.BytesPerSecondSI, _CARD + " out")
GPU_REPLAYS = _gpu("pcie_replays", "DCGM_FI_DEV_PCIE_REPLAY_COUNTER", EVENTS_PER_SECOND, _CARD, "rate({})")

# Node and start-up
PHASES = Query(
    "startup_phases", f"max by (pod, phase) (vqserve_startup_seconds{{{MODEL}}})", units.Seconds, "{{pod}} {{phase}}"
)
WEIGHTS = Query(
    "weights", f"max by (rank, part) (vqserve_weights_bytes{{{MODEL}}})", units.BytesIEC, "rank {{rank}}, {{part}}"
)
RESTARTS = Query(
    "restarts", f"max by (pod) (kube_pod_container_status_restarts_total{{{CONTAINER}}})", units.Short, "{{pod}}"
)
LAST_END = Query(
    "last_terminated_reason",
    f"max by (pod, reason) (kube_pod_container_status_last_terminated_reason{{{CONTAINER}}}) == 1",
    units.NoUnit,
    "{{pod}}: {{reason}}",
)
READY = Query("ready", f"sum(kube_pod_container_status_ready{{{CONTAINER}}})", units.Short, "ready replicas")
UPTIME = Query(
    "time_since_start",
    f"time() - max by (pod) (kube_pod_container_state_started{{{CONTAINER}}})",
    units.DurationSeconds,
    "{{pod}}",
)
MEMORY = Query(
    "container_memory",
    f"max by (pod) (container_memory_working_set_bytes{{{CONTAINER}}})",
    units.BytesIEC,
    "{{pod}}",
)
CPU = Query(
    "container_cpu",
    f"sum by (pod) ({_rate('container_cpu_usage_seconds_total', CONTAINER)})",
    CORES,
    "{{pod}}",
)
# The kubelet knows the claim, and kube-state-metrics whose volume `model` it is.
_CLAIM = (
    "and on (namespace, persistentvolumeclaim)"
    f' kube_pod_spec_volumes_persistentvolumeclaims_info{{{PODS},volume="model"}}'
)


def _volume(name: str, which: str, legend: str) -> Query:
    stats = f'kubelet_volume_stats_{which}_bytes{{namespace="$namespace"}}'
    return Query(name, f"max by (persistentvolumeclaim) ({stats} {_CLAIM})", units.BytesIEC, legend)


VOLUME_FREE = _volume("checkpoint_volume_free", "available", "{{persistentvolumeclaim}}: free")
VOLUME_SIZE = _volume("checkpoint_volume_size", "capacity", "{{persistentvolumeclaim}}: size")


def all_queries() -> list[Query]:
    """Every query of this module, in the order of their definition."""
    found: list[Query] = []
    for value in globals().values():
        if isinstance(value, Query):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend(each for each in value if isinstance(each, Query))
    return found
