"""The dashboards: which panels, in which order, and the variables above them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.units import PercentUnit, Short

from vqserve_ops.monitoring import queries as q
from vqserve_ops.monitoring.panels import DATASOURCE, AnyPanel, bars, buckets, lines, now

TAG = "vqserve"
MARK = "vqserve_context_limit_tokens"
"""A metric that every engine of ours has, and no other: variables list what has it."""

TTFT_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TPOT_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
E2E_BOUNDS = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0)
"""Thresholds to choose from, in seconds: bounds of vLLM's histograms, which know nothing in between."""

Variable = builders.QueryVariable | builders.DatasourceVariable | builders.CustomVariable


@dataclass(frozen=True)
class Page:
    """A dashboard.

    Attributes:
        name: Of its file; its uid is `vqserve-` and this, and must never change: links and favourites hold it.
        title: What people read.
        description: One sentence.
        rows: Panels under their headings.
        thresholds: Whether it has the variables for thresholds.
    """

    name: str
    title: str
    description: str
    rows: Callable[[], dict[str, Sequence[AnyPanel]]]
    thresholds: bool = False

    @property
    def uid(self) -> str:
        """What Grafana knows it by."""
        return f"vqserve-{self.name}"

    def built(self) -> Dashboard:
        """The dashboard as Grafana takes it."""
        link = builders.DashboardLink("vqserve").type(DashboardLinkType.DASHBOARDS).tags([TAG])
        made = (
            builders.Dashboard(f"vqserve / {self.title}")
            .uid(self.uid)
            .description(self.description)
            .tags([TAG])
            .readonly()
            .time("now-1h", "now")
            .timezone("browser")
            .refresh("30s")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .link(link.as_dropdown(True).include_vars(True).keep_time(True))
        )
        for variable in [*_where(), *(_thresholds() if self.thresholds else [])]:
            made.with_variable(variable)
        for heading, panels in self.rows().items():
            made.with_row(builders.Row(heading))
            for panel in panels:
                made.with_panel(panel)
        dashboard = made.build()
        for number, each in enumerate(dashboard.panels or [], 1):
            each.id_val = number
        return dashboard


def _where() -> list[Variable]:
    here = "$namespace"
    return [
        builders.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        _listed("namespace", "Namespace", f"label_values({MARK}, namespace)"),
        _listed("release", "Release", f'label_values({MARK}{{namespace="{here}"}}, service)'),
        _listed("model_name", "Model", f'label_values({MARK}{{namespace="{here}",service="$release"}}, model_name)')
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all")),
    ]


def _listed(name: str, label: str, query: str) -> builders.QueryVariable:
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _thresholds() -> list[Variable]:
    return [
        _bounds("ttft", "First token within (s)", TTFT_BOUNDS, 5.0),
        _bounds("tpot", "Each further token within (s)", TPOT_BOUNDS, 0.1),
        _bounds("e2e", "Whole answer within (s)", E2E_BOUNDS, 60.0),
    ]


def _bounds(name: str, label: str, bounds: Sequence[float], chosen: float) -> builders.CustomVariable:
    """Written as the label `le` has them."""
    return (
        builders.CustomVariable(name)
        .label(label)
        .values(",".join(map(str, bounds)))
        .options([VariableOption(bound == chosen, str(bound), str(bound)) for bound in bounds])
        .current(VariableOption(True, str(chosen), str(chosen)))
        .allow_custom_value(False)
    )


def _overview() -> dict[str, Sequence[AnyPanel]]:
    return {
        "Now": [
            now("Status", "What each replica's server says of itself.", q.STATUS, width=8, names=True),
            now("Running", "Requests that are being answered.", q.RUNNING),
            now("Waiting", "Requests that no replica has begun.", q.WAITING),
            now("Since the last token", "How long a replica with running requests gave no token.", q.SILENCE, width=8),
        ],
        "Throughput": [
            lines("Tokens", "Tokens read and written per second, of all replicas.", q.GENERATED, q.PROMPT),
            lines("Requests", "Requests that run and that wait, of all replicas.", q.RUNNING, q.WAITING),
            lines("Waiting, by reason", "Why requests wait.", q.WAITING_WHY, stacked=True),
        ],
        "Latency": [
            lines("Time to first token", "From a request's arrival to its first token.", *q.TTFT, width=12),
            lines("Between tokens", "From one step of an answer to the next.", *q.ITL, width=12),
        ],
        "Refusals and errors": [
            lines("Refused", "Requests refused before they reached the engine, by cause.", q.REFUSED, q.REJECTED),
            lines(
                "Failed",
                "Requests that the engine gave up; vLLM does not count those whose clients went away.",
                q.FAILED,
            ),
            lines("Responses", "HTTP responses of /v1, by class of status.", q.RESPONSES),
        ],
        "Replicas": [
            lines("Replicas", "How many replicas have each status.", q.REPLICAS, stacked=True, width=24),
        ],
    }


def _context() -> dict[str, Sequence[AnyPanel]]:
    return {
        "Length of contexts": [
            buckets(
                "Share of the cap", "Prompt and answer of finished requests as a share of the cap.",
                q.CONTEXT_SHARE, PercentUnit,
            ),
            buckets("Tokens", "Prompt and answer of finished requests in tokens.", q.CONTEXT_TOKENS, Short),
            lines("Against the cap", "Long contexts, and the most that is served.", q.CONTEXT_P95, q.CONTEXT_LIMIT),
            lines("Near the cap", "Share of finished requests that used over 90 % of the cap.", q.NEAR_LIMIT, top=1),
            lines("At the cap", "Requests refused or cut off because of the cap.", q.OVER_LIMIT, q.CUT_OFF),
        ],
        "KV cache": [
            lines("Usage", "Share of the KV cache that is in use, by replica.", q.KV_USAGE, top=1, width=6),
            lines("Capacity", "Tokens that the KV caches hold and could hold.", q.KV_USED, q.KV_CAPACITY, width=6),
            lines(
                "Preemptions", "Running requests whose cache was evicted for others, to be computed anew.",
                q.PREEMPTIONS, width=6,
            ),
            lines(
                "Prefix cache", "Share of looked-up prompt tokens that the cache had already.",
                q.PREFIX_HITS, top=1, width=6,
            ),
        ],
    }  # fmt: skip


def _quality() -> dict[str, Sequence[AnyPanel]]:
    return {
        "Goodput": [
            lines(
                "Within each threshold", "Share of finished requests within the thresholds chosen above.",
                q.GOOD_TTFT, q.GOOD_TPOT, q.GOOD_E2E, top=1, width=12,
            ),
            lines(
                "Goodput",
                "The least share of requests that can have met all three thresholds, from the shares beside this.",
                q.GOODPUT, top=1, width=12,
            ),
        ],
        "Latency": [
            lines("Time per output token", "Mean of a request after its first token.", *q.TPOT),
            lines("Whole answer", "From a request's arrival to its last token.", *q.E2E),
            lines(
                "Where time goes", "Mean time of a request in each phase.",
                q.QUEUE_TIME, q.PREFILL_TIME, q.DECODE_TIME, stacked=True,
            ),
        ],
        "Speed of one stream, by how many decode at once": [
            lines("Median", "Half of the steps were faster for each of their streams.", q.SPEED, width=12),
            lines("Slowest 5 %", "95 % of the steps were faster for each of their streams.", q.SPEED_LOW, width=12),
        ],
        "Endings": [
            lines("Finished", "Finished requests by what ended them.", q.FINISHED, stacked=True, width=12),
            lines(
                "Safety nets", "How often thinking was closed and repetition prevented.",
                q.THINKING_CLOSED, q.ANTI_REPETITION, width=12,
            ),
        ],
    }  # fmt: skip


def _gpus() -> dict[str, Sequence[AnyPanel]]:
    return {
        "Memory": [
            lines("Used", "Memory in use on each GPU of the release.", q.GPU_USED, width=12),
            lines("Free", "Memory left on each GPU of the release.", q.GPU_FREE, width=12),
        ],
        "Work": [
            lines("Busy", "Share of time in which some kernel ran.", q.GPU_BUSY, top=100),
            lines("Memory busy", "Share of time in which memory was read or written.", q.GPU_COPY, top=100),
            lines(
                "Memory bandwidth", "Share of cycles in which memory moved data, if DCGM can profile the card.",
                q.GPU_DRAM, top=1,
            ),
        ],
        "PCIe": [
            lines(
                "Traffic", "Bytes over PCIe, headers included, where DCGM can profile the card.",
                q.GPU_RX, q.GPU_TX, width=12,
            ),
            lines("Replays", "Packets sent again, which a sound link hardly ever does.", q.GPU_REPLAYS, width=12),
        ],
        "Health": [
            lines("Power", "Power draw of each GPU.", q.GPU_POWER),
            lines(
                "Temperature", "Of GPU and memory; memory's is 0 where the card does not tell.",
                q.GPU_TEMPERATURE, q.GPU_MEMORY_TEMPERATURE,
            ),
            lines("XID", "Code of the driver's last error on each GPU, 0 if there was none.", q.GPU_XID),
        ],
    }  # fmt: skip


def _startup() -> dict[str, Sequence[AnyPanel]]:
    return {
        "Start": [
            bars("Phases", "How long each finished phase of a replica's last start took.", q.PHASES),
            bars("Weights", "Bytes of weights that each rank holds, by part of the model.", q.WEIGHTS),
        ],
        "Pods": [
            now("Ready", "Replicas whose engine is ready.", q.READY),
            now("Since start", "How long each engine's container has been running.", q.UPTIME, width=10),
            now("Last end", "Why each engine's container ended the last time.", q.LAST_END, width=10, names=True),
            lines("Restarts", "Restarts of each engine's container since its pod was made.", q.RESTARTS),
            lines("Memory", "Memory of each engine's container that the kernel cannot take back.", q.MEMORY),
            lines("CPU", "Cores that each engine's container uses.", q.CPU),
        ],
        "Checkpoint": [
            lines(
                "Volume", "Size and free room of the claim with the checkpoint, if it is on one.",
                q.VOLUME_FREE, q.VOLUME_SIZE, width=24,
            ),
        ],
    }  # fmt: skip


PAGES = (
    Page("overview", "Overview", "Whether a release serves, how much, and how fast.", _overview),
    Page("context", "Context", "How long contexts are, and what holds them.", _context),
    Page("quality", "Quality of service", "What users get of speed and endings.", _quality, thresholds=True),
    Page("gpus", "GPUs", "The GPUs that a release's pods have, as NVIDIA's DCGM exporter sees them.", _gpus),
    Page("startup", "Node and start-up", "How replicas start, and what they stand on.", _startup),
)
