"""The tables of `winrates.json`, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stepwise.samples import ALL
from stepwise.winrates import CVAR, OPPONENTS, PLUG_IN, WIN_RATE, WORST

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def render(found: Mapping[str, Any]) -> Group:
    """Who beats whom; then the risks, and behind each in brackets that of the policy against itself."""
    from rich.console import Group

    levels = {**found, "estimates": [e for e in found["estimates"] if e["baseline"] is None]}
    tables = (_matrix(levels), _strata(levels), _risks(levels), _differences(found))
    return Group(*(table for table in tables if table.row_count))


def _matrix(found: Mapping[str, Any]) -> Table:
    rows = {(e["policy"], e["opponent"]): e for e in found["estimates"] if (e["metric"], e["stratum"]) == _OVERALL}
    levels = {(row["policy"], row["metric"]): row for row in found["levels"]}
    metrics = list(dict.fromkeys(row["metric"] for row in found["levels"]))
    title = f"how often a policy beats another, by {found['judge']['by']}"
    table = _table(title, "policy", *(f"against {name}" for name in found["policies"]), *metrics)
    for name in found["policies"]:
        against = [_cell(rows.get((name, other))) for other in found["policies"]]
        table.add_row(name, *against, *(_cell(levels.get((name, metric))) for metric in metrics))
    return table


def _strata(found: Mapping[str, Any]) -> Table:
    chosen = [e for e in found["estimates"] if e["metric"] == WIN_RATE and e["stratum"] != ALL]
    strata = list(dict.fromkeys(e["stratum"] for e in chosen))
    rows = {(e["policy"], e["opponent"], e["stratum"]): e for e in chosen}
    table = _table("per stratum", "policy", "against", *strata)
    for policy, opponent in dict.fromkeys((e["policy"], e["opponent"]) for e in chosen):
        table.add_row(policy, opponent, *(_cell(rows.get((policy, opponent, stratum))) for stratum in strata))
    return table


def _risks(found: Mapping[str, Any]) -> Table:
    by = {(e["policy"], e["opponent"], e["metric"]): e for e in found["estimates"] if e["metric"] != WIN_RATE}
    heads = _heads(found)
    shown = {metric: head for metric, head in heads.items() if any(key[2] == metric for key in by)}
    table = _table("risks, and in brackets those of the policy against itself", "policy", "against", *shown.values())
    for policy, opponent in dict.fromkeys(key[:2] for key in by if key[0] != key[1]):
        cells = [_risk(by.get((policy, opponent, m)), by.get((policy, policy, m))) for m in shown]
        table.add_row(policy, opponent, *cells)
    return table


def _differences(found: Mapping[str, Any]) -> Table:
    chosen = [e for e in found["estimates"] if e["baseline"] is not None and e["stratum"] == ALL]
    rows = {(e["policy"], e["baseline"], e["metric"]): e for e in chosen}
    heads = {WIN_RATE: "win rate", **_heads(found)}
    shown = [metric for metric in heads if any(key[2] == metric for key in rows)]
    title = f"differences against {found['policies'][0]}"
    table = _table(title, "policy", "less", *(heads[metric] for metric in shown))
    for policy, baseline in dict.fromkeys(key[:2] for key in rows):
        table.add_row(policy, baseline, *(_cell(rows.get((policy, baseline, metric))) for metric in shown))
    return table


def _heads(found: Mapping[str, Any]) -> dict[str, str]:
    share = f"{found['settings']['tail']:g} of"
    return {
        WORST: "worst stratum",
        CVAR: f"worst {share} prompts",
        CVAR + PLUG_IN: "chosen and measured alike",
        OPPONENTS: f"against the worst {share} replies",
    }


_OVERALL = WIN_RATE, ALL


def _table(title: str, *heads: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(*heads, title=title, box=SIMPLE)


def _risk(row: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> str:
    text = _cell(row)
    if row is not None and row["stratum"] != ALL and row["value"] is not None:
        text = f"{row['stratum']}: {text}"
    return text if own is None or own["value"] is None else f"{text} ({own['value']:.3g})"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    if row["low"] is None or row["high"] is None:
        return f"{row['value']:.3g}"
    return f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
