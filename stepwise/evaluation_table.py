"""The table of policies, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from stepwise.evaluation import Estimate
from stepwise.samples import ALL

if TYPE_CHECKING:
    from rich.table import Table


def render(estimates: Iterable[Estimate], *, title: str = "") -> Table:
    """One column per policy or comparison; with intervals over all responses, without per stratum."""
    from rich.box import SIMPLE
    from rich.table import Column, Table

    rows: dict[tuple[str, str], dict[str, str]] = {}
    unscored = []
    for estimate in estimates:
        if estimate.stratum == ALL or estimate.metric.startswith(("rewards/", "cost/")):
            rows.setdefault((estimate.stratum, estimate.metric), {})[_heading(estimate)] = _cell(estimate)
        if estimate.unscored and estimate.stratum == ALL:
            unscored.append(f"{_heading(estimate)}, {estimate.metric}: {estimate.unscored} not scored")
    headings = list(dict.fromkeys(heading for row in rows.values() for heading in row))
    first = (Column("stratum", no_wrap=True), Column("metric", no_wrap=True))
    table = Table(*first, *headings, title=title or None, caption="\n".join(unscored) or None, box=SIMPLE)
    strata = sorted({stratum for stratum, _ in rows}, key=lambda name: (name != ALL, name))
    for stratum in strata if len(strata) > 2 else [ALL]:  # a single stratum is the whole
        table.add_section()
        block = [(metric, row) for (home, metric), row in rows.items() if home == stratum]
        for index, (metric, row) in enumerate(block):
            table.add_row("" if index else stratum, metric, *(row.get(heading, "") for heading in headings))
    return table


def _heading(estimate: Estimate) -> str:
    texts = {
        "level": estimate.policy,
        "difference": f"{estimate.policy} - {estimate.baseline}",
        "relative": f"{estimate.policy} / {estimate.baseline} - 1",
    }
    return texts[estimate.kind]


def _cell(estimate: Estimate) -> str:
    def number(value: float) -> str:
        return f"{value:+.1%}" if estimate.kind == "relative" else f"{value:.3g}"

    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None or estimate.stratum != ALL:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
