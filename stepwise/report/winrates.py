"""What the page says of `winrates.json`: a heat map, the strata, the risks. Takes what is there and well-formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwise.report import figures, words
from stepwise.report.evaluations import Evaluation
from stepwise.report.figures import Bar
from stepwise.report.pictures import Picture
from stepwise.report.tables import Table, number_or_none
from stepwise.samples import ALL
from stepwise.winrates import CVAR, OPPONENTS, PLUG_IN, WIN_RATE, WORST

_EVEN = 0.5
Index = dict[tuple[str, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Shown:
    """told: who judged what; table: every policy against the first one, `opponent`."""

    told: str
    warnings: Sequence[str]
    pictures: Sequence[Picture]
    opponent: str
    table: Table


def shown(evaluation: Evaluation, colours: Mapping[str, int]) -> Shown | None:
    """None where there is no winrates.json, or none with policies and a matrix of their rates."""
    found = evaluation.winrates
    if not isinstance(found, dict) or not isinstance(found.get("policies"), list):
        return None
    names, rates = [str(name) for name in found["policies"]], found.get("rates")
    rows = [row for row in rates if isinstance(row, list)] if isinstance(rates, list) else []
    if not names or [len(row) for row in rows] != [len(names)] * len(names):
        return None
    matrix = [[number_or_none(rate) for rate in row] for row in rows]
    index = _index(found.get("estimates"))
    pictures = [Picture("How often the policy of a row beats that of a column", figures.heat(matrix, names))]
    if strata := [name for name in dict.fromkeys(stratum for *_, stratum in index) if name != ALL]:
        title = f"Win rate against {names[0]}, per stratum"
        pictures.append(Picture(title, _strata(index, strata, names, colours)))
    warnings = found.get("warnings")
    return Shown(
        told=_told(found),
        warnings=[str(text) for text in warnings] if isinstance(warnings, list) else [],
        pictures=pictures,
        opponent=names[0],
        table=_table(index, names, colours, _mapping(found.get("settings"))),
    )


def _index(rows: Any) -> Index:
    """Records of `stepwise.winrates.Rate` by policy, opponent, metric, stratum; those of a worst stratum as of all."""
    found: Index = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("baseline") is None:  # a difference has one
            stratum = row.get("stratum") if row.get("metric") == WIN_RATE else ALL
            found[*(str(row.get(key)) for key in ("policy", "opponent", "metric")), str(stratum)] = row
    return found


def _strata(index: Index, strata: Sequence[str], names: Sequence[str], colours: Mapping[str, int]) -> str:
    def bar(row: Mapping[str, Any]) -> Bar:
        value, low, high = (number_or_none(row.get(key)) for key in ("value", "low", "high"))
        return Bar(value, low, high if low is not None else None)

    first, others = names[0], names[1:]
    groups = {name: [bar(index.get((other, first, WIN_RATE, name), {})) for other in others] for name in strata}
    palette = [colours.get(name, 0) for name in others]
    return figures.strata(groups, name=f"win rate against {first}", colours=palette, limits=(0.0, 1.0), line=_EVEN)


def _table(index: Index, names: Sequence[str], colours: Mapping[str, int], settings: Mapping[str, Any]) -> Table:
    tail = number_or_none(settings.get("tail"))
    share = f"{100 * tail:g} %" if tail is not None else "share"
    metrics = {
        WIN_RATE: "win rate",
        WORST: "worst stratum",
        WORST + PLUG_IN: "worst stratum, chosen and measured alike",
        CVAR: f"worst {share} of prompts",
        CVAR + PLUG_IN: f"worst {share} of prompts, chosen and measured alike",
        OPPONENTS: f"against the worst {share} of replies",
    }
    first, others = names[0], names[1:]
    rows = []
    for metric, name in metrics.items():
        cells = [_cell(*(index.get((o, against, metric, ALL), {}) for against in (first, o))) for o in others]
        if any(cells):
            rows.append((metric, name, "higher is better", cells))
    return Table([(name, colours.get(name, -1)) for name in others], rows, [])


def _cell(row: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str] | None:
    value, low, high, itself = (
        number_or_none(source.get(key)) for source, key in ((row, "value"), (row, "low"), (row, "high"), (own, "value"))
    )
    if value is None:
        return None
    said = [] if low is None or high is None else [f"{words.number(low)} … {words.number(high)}"]
    said += [] if itself is None else [f"({words.number(itself)})"]
    said += [] if row.get("stratum") == ALL else [str(row.get("stratum"))]
    return words.number(value), " ".join(said)


def _told(found: Mapping[str, Any]) -> str:
    judge, settings = _mapping(found.get("judge")), _mapping(found.get("settings"))
    said = [f"By {judge.get('by', 'a judge that is not named')}"]
    if settings:
        said.append(f"{settings.get('prompts')} prompts, {settings.get('replies')} replies each")
    if judge.get("pairs"):
        asymmetry, decisive = (number_or_none(judge.get(key)) for key in ("asymmetry", "decisive"))
        said.append(f"{judge['pairs']:,} pairs in both orders, which are {words.number(asymmetry)} apart on average")
        said.append(f"certain of {100 * (decisive or 0):.0f} %")
    return ", ".join(said) + "."


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
