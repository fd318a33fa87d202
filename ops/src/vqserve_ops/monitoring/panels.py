"""Panels of the dashboards: a title, a sentence on what it shows, and queries, which also say the unit and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    HeatmapCellLayout,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Panel
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.units import Short

from vqserve_ops.monitoring.queries import Query

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
AnyPanel = Builder[Panel]
WIDTH = 24
"""Columns of Grafana's grid."""


class _Described(Protocol):
    """What all kinds of panels have."""

    def title(self, title: str) -> Self: ...
    def description(self, description: str) -> Self: ...
    def datasource(self, datasource: DataSourceRef) -> Self: ...
    def unit(self, unit: str) -> Self: ...
    def span(self, w: int) -> Self: ...
    def height(self, h: int) -> Self: ...
    def targets(self, targets: list[Builder[variants.Dataquery]]) -> Self: ...


_P = TypeVar("_P", bound=_Described)


def lines(
    title: str, description: str, *queries: Query, width: int = 8, stacked: bool = False, top: float | None = None
) -> timeseries.Panel:
    """Queries over time.

    Args:
        title: Of the panel.
        description: One sentence.
        queries: All of one unit.
        width: Of `WIDTH` columns.
        stacked: Whether series add up to something.
        top: End of the axis, where the unit has one.
    """
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.TABLE).placement(LegendPlacement.BOTTOM)
    panel = (
        _described(timeseries.Panel(), title, description, queries, width, instant=False)
        .legend(legend.show_legend(True).calcs(["mean", "max", "lastNotNull"]))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .show_points(VisibilityMode.NEVER)
        .fill_opacity(30 if stacked else 8)
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL if stacked else StackingMode.NONE))
        .min(0)
    )
    return panel if top is None else panel.max(top)


def now(title: str, description: str, *queries: Query, width: int = 4, names: bool = False) -> stat.Panel:
    """Queries' latest values, or with `names` the names of the series that there are."""
    return (
        _described(stat.Panel(), title, description, queries, width, instant=True, height=4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .text_mode(BigValueTextMode.NAME if names else BigValueTextMode.AUTO)
        .graph_mode(BigValueGraphMode.NONE)
        .color_mode(BigValueColorMode.NONE)
    )


def bars(title: str, description: str, *queries: Query, width: int = 12) -> bargauge.Panel:
    """Queries' latest values, side by side."""
    return (
        _described(bargauge.Panel(), title, description, queries, width, instant=True)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .orientation(VizOrientation.HORIZONTAL)
        .display_mode(BarGaugeDisplayMode.BASIC)
        .min(0)
    )


def buckets(title: str, description: str, query: Query, of: str, width: int = 12) -> heatmap.Panel:
    """A histogram over time.

    Args:
        title: Of the panel.
        description: One sentence.
        query: Gives how much each bucket grew, as a cumulative histogram with the label `le`.
        of: Unit of the buckets' bounds.
        width: Of `WIDTH` columns.
    """
    return (
        _described(heatmap.Panel(), title, description, [query], width, instant=False, form=PromQueryFormat.HEATMAP)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .y_axis(heatmap.YAxisConfig().unit(of))
        .cell_values(heatmap.CellValues().unit(Short).decimals(0))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.AUTO))
        .show_legend()
        .mode(TooltipDisplayMode.SINGLE)
    )


def _described(
    panel: _P,
    title: str,
    description: str,
    queries: Sequence[Query],
    width: int,
    *,
    instant: bool,
    height: int = 8,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> _P:
    [unit] = {query.unit for query in queries}
    return (
        panel.title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(width)
        .height(height)
        .targets([_target(query, chr(ord("A") + at), instant, form) for at, query in enumerate(queries)])
    )


def _target(query: Query, ref: str, instant: bool, form: PromQueryFormat) -> prometheus.Dataquery:
    target = (
        prometheus.Dataquery()
        .ref_id(ref)
        .datasource(DATASOURCE)
        .expr(query.expr)
        .legend_format(query.legend)
        .format(form)
    )
    return target.instant() if instant else target.range()
