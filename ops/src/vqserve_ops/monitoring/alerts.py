"""Alerts on the state of a release: of its server, what it has to do, its pods, and what it stands on.

Metrics come from the engine (`vllm:`, `vqserve_`), kube-state-metrics (`kube_`), the kubelet (`kubelet_`) and NVIDIA's
DCGM exporter (`DCGM_`). Where one of these is missing, its alerts stay silent; `up` is Prometheus's own.
"""

from __future__ import annotations

from vqserve_ops.monitoring.promql import exported
from vqserve_ops.monitoring.rules import ENGINE, PODS, SCOPE, SUM_BY_RELEASE, Alert, Group, Recording

_POD = "max by (namespace, service, pod)"
_HERE = "{{ $labels.namespace }}/{{ $labels.pod }}"
_SERVICE = "{{ $labels.namespace }}/{{ $labels.service }}"


def groups() -> list[Group]:
    """All of them, by what they look at."""
    return [
        Group("vqserve.server", SERVER),
        Group("vqserve.load", LOAD),
        Group("vqserve.pods", PODS_AND_TARGETS),
        Group("vqserve.node", NODE),
    ]


SERVER = [
    Alert(
        name="VqserveNoTokens",
        expr=f"{_POD} (vqserve_seconds_since_last_token{{{SCOPE}}}) > ${{stallSeconds}}",
        after="1m",
        severity="critical",
        summary="Requests run, and no token comes.",
        description=f"{_HERE} has running requests and gave its last token {{{{ $value | humanizeDuration }}}} ago.",
    ),
    Alert(
        name="VqserveServerFailed",
        expr=(
            "max by (namespace, service, pod, status) (\n"
            f'  vqserve_server_status{{{SCOPE},status=~"stuck|refused|engine dead"}}\n) == 1'
        ),
        after="2m",
        severity="critical",
        summary="A server will not serve again by itself.",
        description=(
            f'{_HERE} says "{{{{ $labels.status }}}}" of itself and is out of rotation; it stays so until its container'
            " restarts."
        ),
    ),
]

LOAD: list[Recording | Alert] = [
    Recording("vqserve:requests_waiting:sum", f"{SUM_BY_RELEASE} (vllm:num_requests_waiting{{{SCOPE}}})"),
    Alert(
        name="VqserveQueueGrowing",
        expr=(
            f"avg_over_time(vqserve:requests_waiting:sum{{{SCOPE}}}[15m]) > ${{waitingRequests}}\n"
            f"and deriv(vqserve:requests_waiting:sum{{{SCOPE}}}[15m]) > 0"
        ),
        after="10m",
        severity="warning",
        summary="Requests come faster than they are answered.",
        description=(
            f"{_SERVICE} had {{{{ $value | humanize }}}} requests waiting on average over 15 minutes, and they become"
            " more."
        ),
    ),
    Alert(
        name="VqserveKvCacheNearlyFull",
        expr=f"{_POD} (avg_over_time(vllm:kv_cache_usage_perc{{{SCOPE}}}[10m])) > 0.95",
        after="10m",
        severity="warning",
        summary="The KV cache is nearly full all the time.",
        description=(
            f"{{{{ $value | humanizePercentage }}}} of the KV cache of {_HERE} was in use on average over 10 minutes:"
            " new requests wait, running ones are preempted."
        ),
    ),
    Alert(
        name="VqservePreemptions",
        expr=(
            f"(\n  {SUM_BY_RELEASE} (increase(vllm:num_preemptions_total{{{SCOPE}}}[30m]))\n"
            f"  / {SUM_BY_RELEASE} (increase(vllm:request_success_total{{{SCOPE}}}[30m])) > 0.1\n)\n"
            f"and {SUM_BY_RELEASE} (increase(vllm:num_preemptions_total{{{SCOPE}}}[30m])) > 5"
        ),
        after="15m",
        severity="warning",
        summary="Running requests are put back and computed anew.",
        description=(
            f'{_SERVICE} had {{{{ printf "%.2f" $value }}}} preemptions for each finished request in the last'
            " 30 minutes."
        ),
    ),
    Alert(
        name="VqserveRequestsOverCap",
        expr=(
            f'(\n  {SUM_BY_RELEASE} (increase(vqserve_refused_requests_total{{{SCOPE},cause="context_limit"}}[1h]))\n'
            f"  / (\n    {SUM_BY_RELEASE} (increase(vqserve_finished_requests_total{{{SCOPE}}}[1h]))\n"
            f'    + {SUM_BY_RELEASE} (increase(vqserve_refused_requests_total{{{SCOPE},cause="context_limit"}}[1h]))\n'
            "  ) > 0.05\n)\n"
            f'and {SUM_BY_RELEASE} (increase(vqserve_refused_requests_total{{{SCOPE},cause="context_limit"}}[1h])) > 10'
        ),
        after="15m",
        severity="warning",
        summary="Many requests are longer than the context.",
        description=(
            f"{{{{ $value | humanizePercentage }}}} of the requests to {_SERVICE} in the last hour were refused because"
            " prompt and answer together would exceed the context."
        ),
    ),
]

_STATE = "max by (namespace, pod)"

PODS_AND_TARGETS = [
    Alert(
        name="VqserveCrashLoop",
        expr=(
            # Fractions, as increase() extrapolates. A start takes minutes: three of them are an hour and more.
            "max by (namespace, pod, container) (\n"
            f"  increase(kube_pod_container_status_restarts_total{{{ENGINE}}}[2h])\n"
            f"  or increase(kube_pod_init_container_status_restarts_total{{{PODS}}}[2h])\n) > 2.5"
        ),
        after="1m",
        severity="critical",
        summary="A container starts again and again.",
        description=(
            f"Container {{{{ $labels.container }}}} of {_HERE} restarted"
            ' {{ printf "%.0f" $value }} times in two hours.'
        ),
    ),
    Alert(
        name="VqserveNotReady",
        # The phase, as the startup probe kills a container at the end of its budget, and the next one begins anew.
        expr=(
            f"{_STATE} (kube_pod_container_status_ready{{{ENGINE}}}) == 0\n"
            f'and on (namespace, pod) kube_pod_status_phase{{{PODS},phase="Running"}} == 1\n'
            f'unless on (namespace, pod) vqserve_server_status{{{SCOPE},status="draining"}} == 1'
        ),
        after="${loadSeconds}s",
        severity="critical",
        summary="A replica is not ready for longer than a start may take.",
        description=(
            f"{_HERE} runs and has not been ready for ${{loadSeconds}} s, which is all that a start may take"
            " (probes.startup.budgetSeconds)."
        ),
    ),
    Alert(
        name="VqservePodNotStarting",
        expr=(
            f'{_STATE} (kube_pod_status_scheduled{{{PODS},condition="true"}}) == 1\n'
            f'and on (namespace, pod) kube_pod_status_phase{{{PODS},phase="Pending"}} == 1\n'
            "unless on (namespace, pod) (\n"
            f"  kube_pod_init_container_status_running{{{PODS}}} == 1\n"
            f"  or kube_pod_init_container_status_terminated{{{PODS}}} == 1\n"
            f"  or kube_pod_init_container_status_restarts_total{{{PODS}}} > 0\n)"
        ),
        after="15m",
        severity="critical",
        summary="A pod has a node, and none of its containers starts.",
        description=(
            f"{_HERE} was given a node and no container of it has started in 15 minutes: a volume cannot be mounted, or"
            " an image cannot be fetched."
        ),
    ),
    Alert(
        name="VqserveTargetDown",
        expr=(f"{_POD} (up{{{SCOPE}}}) == 0\nand on (namespace, pod) kube_pod_container_status_ready{{{ENGINE}}} == 1"),
        after="5m",
        severity="warning",
        summary="A replica serves, and its metrics cannot be scraped.",
        description=f"{_HERE} is ready and Prometheus cannot scrape it: other alerts on it are blind.",
    ),
    Alert(
        name="VqserveAbsent",
        expr=f"absent(up{{{SCOPE}}})\nor {SUM_BY_RELEASE} (up{{{SCOPE}}}) == 0",
        after="${loadSeconds}s",
        severity="critical",
        summary="No replica of the release can be scraped.",
        description=(
            f"Prometheus has scraped no replica of {_SERVICE} for ${{loadSeconds}} s, longer than a start may take."
        ),
    ),
]

_CLAIMS = 'namespace="${namespace}",persistentvolumeclaim=~"${claims}"'

NODE = [
    Alert(
        name="VqserveGpuError",
        # 43 and 45 are what a process that crashed or was killed leaves: crash loops have their own alert.
        expr=(
            f"max by (Hostname, gpu, UUID) (\n  DCGM_FI_DEV_XID_ERRORS{{{PODS}}}\n"
            f"  or DCGM_FI_DEV_XID_ERRORS{{{exported(PODS)}}}\n) > 0 != 43 != 45"
        ),
        after="1m",
        severity="critical",
        summary="The driver reported an error of a GPU that the engine uses.",
        description=(
            "GPU {{ $labels.gpu }} ({{ $labels.UUID }}) of node {{ $labels.Hostname }} last reported"
            ' XID {{ printf "%.0f" $value }}.'
        ),
    ),
    Alert(
        name="VqserveVolumeNearlyFull",
        # A checkpoint that fills its volume and stays as it is does no harm: only what goes on filling does.
        expr=(
            "(\n"
            f"  kubelet_volume_stats_available_bytes{{{_CLAIMS}}}\n"
            f"  / kubelet_volume_stats_capacity_bytes{{{_CLAIMS}}} < 0.1\n"
            f"  and delta(kubelet_volume_stats_available_bytes{{{_CLAIMS}}}[1h]) < 0\n)\n"
            f"or kubelet_volume_stats_inodes_free{{{_CLAIMS}}} / kubelet_volume_stats_inodes{{{_CLAIMS}}} < 0.05"
        ),
        after="10m",
        severity="warning",
        summary="A volume of the release is nearly full.",
        description=(
            "Claim {{ $labels.namespace }}/{{ $labels.persistentvolumeclaim }} has"
            " {{ $value | humanizePercentage }} of its room or of its inodes left."
        ),
    ),
]
