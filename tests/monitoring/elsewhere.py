"""What queries and alerts ask of others than the engine, as those document it: no demo on a bare machine has it."""

from __future__ import annotations

from vqserve_ops.monitoring import metrics

_OF_POD = {"namespace", "pod", "uid"}
_OF_CONTAINER = _OF_POD | {"container"}
_OF_CLAIM = {"namespace", "persistentvolumeclaim"}

KUBE_STATE_METRICS: dict[str, set[str]] = {
    "kube_pod_container_state_started": _OF_CONTAINER,
    "kube_pod_container_status_last_terminated_reason": _OF_CONTAINER | {"reason"},
    "kube_pod_container_status_ready": _OF_CONTAINER,
    "kube_pod_container_status_restarts_total": _OF_CONTAINER,
    "kube_pod_init_container_status_restarts_total": _OF_CONTAINER,
    "kube_pod_init_container_status_running": _OF_CONTAINER,
    "kube_pod_init_container_status_terminated": _OF_CONTAINER,
    "kube_pod_spec_volumes_persistentvolumeclaims_info": _OF_POD | {"volume", "persistentvolumeclaim"},
    "kube_pod_status_phase": _OF_POD | {"phase"},
    "kube_pod_status_scheduled": _OF_POD | {"condition"},
}
"""Labels by metric: `docs/metrics/workload/pod-metrics.md` of github.com/kubernetes/kube-state-metrics at 04ee634c."""

KUBELET: dict[str, set[str]] = {
    "kubelet_volume_stats_available_bytes": _OF_CLAIM,
    "kubelet_volume_stats_capacity_bytes": _OF_CLAIM,
    "kubelet_volume_stats_inodes": _OF_CLAIM,
    "kubelet_volume_stats_inodes_free": _OF_CLAIM,
    "container_cpu_usage_seconds_total": {"namespace", "pod", "container"},
    "container_memory_working_set_bytes": {"namespace", "pod", "container"},
}
"""Labels by metric.

Of volumes: `pkg/kubelet/metrics/collectors/volume_stats.go` of github.com/kubernetes/kubernetes at 03ac3ef2. Of
containers: `docs/storage/prometheus.md` of github.com/google/cadvisor at 0210b111, which the kubelet contains, with the
labels that `containerPrometheusLabelsFunc` of its `pkg/kubelet/server/server.go` adds.
"""

DCGM: dict[str, set[str]] = {
    name: {"Hostname", "gpu", "UUID", "namespace", "pod", "exported_namespace", "exported_pod"}
    for name in metrics.DCGM_DEFAULTS
}
DOCUMENTED = {"kube-state-metrics": KUBE_STATE_METRICS, "kubelet": KUBELET, "dcgm": DCGM}
"""By the source that `Metric` names."""

UNANSWERED = {
    **dict.fromkeys(
        (
            "gpu_memory_used", "gpu_memory_free", "gpu_power", "gpu_utilisation", "gpu_memory_utilisation",
            "gpu_dram_active", "gpu_temperature", "gpu_memory_temperature", "gpu_xid", "pcie_rx", "pcie_tx",
            "pcie_replays",
        ),
        "dcgm",
    ),
    **dict.fromkeys(
        ("restarts", "last_terminated_reason", "ready", "time_since_start"),
        "kube-state-metrics",
    ),
    **dict.fromkeys(
        ("container_memory", "container_cpu", "checkpoint_volume_free", "checkpoint_volume_size"),
        "kubelet",
    ),
}  # fmt: skip
"""Queries of the dashboards that have no answer beside a server on a bare machine: who is missing there."""

DID_NOT_OCCUR = {
    # vLLM turns it off for MLA on a CPU without AMX: 0 hits by 0 look-ups.
    "prefix_cache_hit_rate": 'vllm:cache_config_info{enable_prefix_caching="False"}',
}
"""Queries for something that the engine counts and that does not happen to the demo, if what is named here has data."""
