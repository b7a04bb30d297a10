"""The figures of the report, as SVG whose colours are names that the page gives meaning to, in light and in dark.

Text stays text: it can be searched, copied and scaled, and takes the font of the page. No figure reads a file.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Limits = tuple[float, float] | None

SERIES = 8  # colours that the page knows for policies
_INK, _QUIET, _LINE, _ALARM, _FILL = (f"#0a0b0{i}" for i in range(1, 6))
_NAMES = {_INK: "ink", _QUIET: "quiet", _LINE: "line", _ALARM: "alarm", _FILL: "paper"}
_COLOURS = [f"#0a0c0{i}" for i in range(SERIES)]
_NAMES |= {colour: f"series-{i}" for i, colour in enumerate(_COLOURS)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stepwise",
    "text.parse_math": False,  # a name with a dollar in it is a name
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _QUIET,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.55,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Curve:
    """A line: y against x, in the colour with this number; low and high a band around it. name: for a legend."""

    x: Sequence[float] | Floats
    y: Sequence[float] | Floats
    colour: int
    name: str = ""
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Bar:
    """A value with its interval, if it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """A strength tried: what it helps, the risk seen and its upper bound."""

    label: str
    helpfulness: float
    risk: float
    bound: float
    chosen: bool


class _Sheet:
    """One figure while it is drawn; `svg` is filled when it is done."""

    def __init__(self, axes: Any) -> None:
        self.axes, self.svg = axes, ""


@contextmanager
def _sheet(width: float, height: float, *, label: str) -> Iterator[_Sheet]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        sheet = _Sheet(figure.add_subplot())
        yield sheet
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    sheet.svg = _for_page(written.getvalue(), label)


def _for_page(svg: str, label: str) -> str:
    """An element to put into HTML: no XML head, ids of its own, colours by name, shapes that scale, a text for readers
    that see no picture."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    own = hashlib.sha256(f"{label}{svg}".encode()).hexdigest()[:10]  # ids must not repeat on one page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{own}-", svg)
    svg = re.sub(r"#0a0[bc]0\d", lambda found: f"var(--{_NAMES[found[0]]})", svg)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)
    box, width = (re.search(rf'{name}="([^"]+)"', svg[: svg.index(">")]) for name in ("viewBox", "width"))
    assert box is not None and width is not None
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="{box[1]}" style="max-width: {width[1]}">'
    return head + svg[svg.index(">") + 1 :]


def span(values: Sequence[Sequence[float] | Floats]) -> Limits:
    """Limits that all values fit in, with a little room; None where there are none."""
    every = np.concatenate([np.asarray(v, dtype=np.float64) for v in values]) if values else np.empty(0)
    every = every[np.isfinite(every)]
    if not len(every):
        return None
    low, high = float(every.min()), float(every.max())
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def quantiles(curves: Sequence[Curve], *, name: str, tail: float | None, limits: Limits) -> str:
    """A score against its quantile; `tail` shades the share that counts as the tail: the largest for a cost, the
    smallest (negative) for a reward."""
    with _sheet(4.6, 2.7, label=f"{name} against its quantile, a line per policy") as sheet:
        axes = sheet.axes
        if tail is not None:
            ends = (1 - tail, 1.0) if tail > 0 else (0.0, -tail)
            axes.axvspan(*ends, color=_LINE, alpha=0.28, linewidth=0)
        for curve in curves:
            axes.plot(curve.x, curve.y, color=_COLOURS[curve.colour], drawstyle="steps-post")
        axes.set(xlabel="quantile of the responses", ylabel=name, xlim=(0, 1), ylim=limits)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 0.9, 1], ["0", "¼", "½", "¾", "0.9", "1"])
    return sheet.svg


def hardness(curves: Sequence[Curve], *, name: str, limits: Limits) -> str:
    """The mean of a score over the hardest share of the prompts, against that share, with intervals."""
    label = f"{name} over the hardest prompts, a line per policy"
    return _banded(curves, label=label, xlabel="hardest share of the prompts", ylabel=name, xlim=(0, 1), ylim=limits)


def drift(curves: Sequence[Curve], *, name: str, limits: Limits) -> str:
    """A metric over blocks of prompts in the order they were answered, with intervals."""
    label = f"{name} over the prompts in their order, a line per policy"
    return _banded(curves, label=label, xlabel="prompt", ylabel=name, ylim=limits)


def _banded(curves: Sequence[Curve], *, label: str, **axis: Any) -> str:
    """A line with its band per policy; `axis` are settings of matplotlib's axes."""
    with _sheet(4.6, 2.7, label=label) as sheet:
        for curve in curves:
            _band(sheet.axes, curve)
            sheet.axes.plot(curve.x, curve.y, color=_COLOURS[curve.colour], marker="o", markersize=2.2)
        sheet.axes.set(**axis)
    return sheet.svg


def _band(axes: Any, curve: Curve) -> None:
    if curve.low is not None and curve.high is not None:
        band = np.array([[np.nan if v is None else v for v in side] for side in (curve.low, curve.high)])
        axes.fill_between(curve.x, band[0], band[1], color=_COLOURS[curve.colour], alpha=0.18, linewidth=0)


def strata(
    groups: Mapping[str, Sequence[Bar]],
    *,
    name: str,
    colours: Sequence[int],
    limits: Limits,
    line: float | None = None,
) -> str:
    """Bars side by side per stratum, one per policy, with their intervals. line: a level that matters."""
    with _sheet(4.6, 2.7, label=f"{name} per stratum, a bar per policy") as sheet:
        axes, width = sheet.axes, 0.8 / max(1, len(colours))
        for place, colour in enumerate(colours):
            bars = [(x, group[place]) for x, group in enumerate(groups.values()) if group[place].value is not None]
            at = [x + (place + 0.5) * width - 0.4 for x, _ in bars]
            heights = [bar.value or 0.0 for _, bar in bars]
            axes.bar(at, heights, width * 0.86, color=_COLOURS[colour], linewidth=0)
            ranged = [(x, bar) for x, (_, bar) in zip(at, bars, strict=True) if bar.low is not None]
            axes.vlines([x for x, _ in ranged], [b.low for _, b in ranged], [b.high for _, b in ranged], _INK, lw=0.9)
        if line is not None:
            axes.axhline(line, color=_ALARM, linewidth=1)
        axes.set(ylabel=name, ylim=limits)
        axes.set_xticks(range(len(groups)), [_short(group) for group in groups])
        axes.grid(visible=False, axis="x")
    return sheet.svg


def frontier(points: Sequence[Point], *, name: str, limit: float, limits: tuple[Limits, Limits]) -> str:
    """Risk and its bound against helpfulness, a point per strength tried, with the limit and the one chosen."""
    with _sheet(4.6, 3.0, label=f"the risk of {name} against helpfulness, a point per strength tried") as sheet:
        axes = sheet.axes
        x, risk = [p.helpfulness for p in points], [p.risk for p in points]
        axes.axhline(limit, color=_ALARM, linewidth=1.2)
        axes.annotate(
            f"limit {limit:g}", (0, limit), xycoords=("axes fraction", "data"), xytext=(3, 3),
            textcoords="offset points", color=_ALARM, fontsize=8,
        )  # fmt: skip
        axes.vlines(x, risk, [p.bound for p in points], _QUIET, linewidth=1)
        axes.plot(x, [p.bound for p in points], "_", color=_QUIET, markersize=8)
        axes.plot(x, risk, "-", color=_LINE, zorder=1)
        axes.plot(x, risk, "o", color=_INK, markersize=4)
        for point in points:
            if point.chosen:
                axes.plot(point.helpfulness, point.risk, "o", markersize=11, mfc="none", mec=_ALARM, mew=1.4)
            axes.annotate(
                point.label, (point.helpfulness, point.risk), xytext=(8, -3), textcoords="offset points",
                fontsize=8, color=_INK if point.chosen else _QUIET,
                weight="bold" if point.chosen else "normal",
            )  # fmt: skip
        axes.set(xlabel="mean helpfulness", ylabel=f"risk of {name}", xlim=limits[0], ylim=limits[1])
    return sheet.svg


def paths(
    curves: Sequence[Curve],
    *,
    label: str,
    size: tuple[float, float],
    limits: Limits = None,
    breaks: Sequence[float] = (),
    lines: Sequence[float] = (),
) -> str:
    """Numbers of one kind over the steps of a stage. breaks: steps at which rounds end; lines: levels that matter."""
    with _sheet(*size, label=f"{label} over the steps of the stage") as sheet:
        axes = sheet.axes
        for level in lines:
            axes.axhline(level, color=_ALARM, linewidth=1)
        for end in breaks:
            axes.axvline(end, color=_LINE, linewidth=1, linestyle=(0, (2, 2)))
        for curve in curves:
            _band(axes, curve)
            style = {"color": _COLOURS[curve.colour], "marker": "o" if len(curve.x) < 12 else None, "markersize": 2.6}
            axes.plot(curve.x, curve.y, label=curve.name, **style)
        if len(curves) > 1:
            axes.legend(handlelength=1.2, borderaxespad=0)
        axes.set(ylim=limits)
        axes.margins(x=0.02)
    return sheet.svg


def heat(matrix: Sequence[Sequence[float | None]], names: Sequence[str]) -> str:
    """Who beats whom: row against column, a probability from 0 to 1, written in its field."""
    side = 1.2 + 0.62 * len(names)
    with _sheet(side + 0.6, side, label="the rate at which the policy of a row beats that of a column") as sheet:
        axes = sheet.axes
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                if value is None:
                    continue
                colour, weight = _COLOURS[3 if value >= 0.5 else 2], min(1.0, 2 * abs(value - 0.5))
                box = {"width": 0.94, "left": column - 0.47, "color": colour, "alpha": 0.08 + 0.62 * weight}
                axes.barh(row, height=0.94, linewidth=0, **box)
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
        axes.set_xticks(range(len(names)), [_short(n) for n in names])
        axes.set_yticks(range(len(names)), [_short(n) for n in names])
        axes.xaxis.tick_top()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return sheet.svg


def _short(text: str, most: int = 16) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
