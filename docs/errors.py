"""Every error that stepwise raises with what would be right, read from its code: the table of the troubleshooting page.

mkdocs calls `on_page_markdown` while it builds the site.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MARKER = "<!-- every error -->"
REMEDIES = {  # of a class, where an error has none of its own
    "ConfigError": "Change the recipe, the override or the option that is named.",
    "DataError": "The message names file and row. Repair the row, or leave such rows out: `on_bad_row: skip`.",
    "ModelError": "Name another model, or the folder that holds all its files.",
    "ScoreError": "Repair the cost or reward model, and try it with `stepwise probe`; the same command then goes on.",
    "CheckpointError": "Nothing was overwritten. Make room, or restore or delete what is named, and go on.",
    "OtherRecipe": "Another `--output`, another `name`, or the recipe that the folder belongs to.",
    "Uncertified": "All is saved; see above.",
    "NonFiniteError": "Nothing was updated. Lower `training.learning_rate`, or look at the rows that are named.",
    "Conflict": "All such problems of a recipe are told at once; change the keys that are named.",
}


class Raised(NamedTuple):
    """An error in the code; what stands for a value is an ellipsis."""

    kind: str
    module: str
    what: str
    wanted: str


def raised() -> Iterator[Raised]:
    """The errors in the order of the modules."""
    for folder in ("stepwise", "constraints", "rewards"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in (path, *path.parents)):
                yield from _of(path)


def _of(path: Path) -> Iterator[Raised]:
    for scope in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = dict(pair for node in ast.walk(scope) if isinstance(node, ast.Assign) for pair in _assigned(node))
        for call in ast.walk(scope):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                told = _told(call, names)
                if told is not None:
                    yield Raised(call.func.id, str(path.relative_to(ROOT)), *told)


def _assigned(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    targets, values = [node.targets[0]], [node.value]
    if isinstance(targets[0], ast.Tuple) and isinstance(values[0], ast.Tuple):
        targets, values = targets[0].elts, values[0].elts
    yield from ((name.id, value) for name, value in zip(targets, values, strict=True) if isinstance(name, ast.Name))


def _told(call: ast.Call, names: dict[str, ast.expr]) -> tuple[str, str] | None:
    assert isinstance(call.func, ast.Name)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if call.func.id == "Conflict" and len(call.args) > 3:
        return _text(call.args[1], names), _text(call.args[3], names)
    if call.func.id in REMEDIES and call.args:
        return _text(call.args[0], names), _text(given.get("wanted"), names)
    return None


def _text(node: ast.expr | None, names: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, {}) for part in node.values)
    if isinstance(node, ast.Name) and node.id in names:
        return _text(names[node.id], {})
    return "" if node is None else "…"


def table() -> str:
    """The errors by class, as Markdown."""
    found = list(dict.fromkeys(raised()))
    lines: list[str] = []
    for kind, remedy in REMEDIES.items():
        rows = [error for error in found if error.kind == kind and error.what.strip("… ")]
        if rows:
            title = "A recipe whose parts do not fit together" if kind == "Conflict" else f"`{kind}`"
            lines += [f"### {title}", "", remedy, "", "| what | what would be right |", "|---|---|"]
            lines += [f"| {_cell(error.what)} | {_cell(error.wanted)} |" for error in rows]
            lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table where the page asks for it."""
    return markdown.replace(MARKER, table()) if MARKER in markdown else markdown
