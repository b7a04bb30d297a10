"""The model card of an export: what was trained on what, how it fared, what is certified, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from stepwise.fidelity import Fidelity
from stepwise.recipe_parts import Model
from stepwise.report import tables, words
from stepwise.report.evaluations import read_json
from stepwise.report.record import Run
from stepwise.run_folder import RunFolder
from stepwise.samples import ALL

_TEMPLATE = Path(__file__).with_name("model_card.md.j2")
_LIBRARY = {"adapter": "peft", "merged": "transformers"}


def write(run: Run, folder: Path, *, kind: str, strength: float, fidelity: Fidelity) -> None:
    """Write README.md, the card of an export of `run` at `strength` of its last stage."""
    model = Model.model_validate(run.recipe["model"]).model_dump()
    on_hub = not Path(model["base"]).exists() and model["base"] != "sandbox"
    sure = certified(run, strength)
    data = ModelCardData(
        library_name=_LIBRARY[kind],
        pipeline_tag="text-generation",
        base_model=model["base"] if on_hub else None,
        tags=["stepwise", *(["lora"] if kind == "adapter" else []), *([] if sure else ["uncertified"])],
    )
    template = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    text = template.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        name=run.recipe["name"],
        kind=kind,
        model=model,
        on_hub=on_hub,
        strength=f"{strength:g}",
        stages=_stages(run),
        certified=sure,
        statement=statement(run, strength),
        assumptions=words.assumptions(run.certificate or {}, run.recipe.get("select") or {}) if sure else [],
        measured=_measured(run, strength),
        responses=_count(run, strength),
        fidelity=fidelity,
        marks=run.marks,
        recipe=run.recipe_text.strip(),
        packages=run.environment.get("packages", {}),
    )
    ModelCard(text).save(folder / "README.md")


def certified(run: Run, strength: float) -> bool:
    """Whether the certificate of a run holds, and is about this strength."""
    found = run.certificate
    return found is not None and found.get("certified") is True and found.get("q") == strength


def statement(run: Run, strength: float) -> str:
    """The certificate in a sentence; or that there is none, and why."""
    found = run.certificate
    if found is None:
        return "Uncertified: the recipe of this run set no limit, or selected no strength that keeps it."
    if found.get("q") in (None, strength):
        told = words.sentence(found)
        return told if certified(run, strength) else f"Uncertified. {told}"
    return (
        f"Uncertified: this is strength {strength:g} of {found['stage']}, and the certificate of the run is about "
        f"strength {found['q']:g}."
    )


def policy_of(run: Run, strength: float) -> str | None:
    """The policy of the run's evaluation that the export is; None where it was not measured at this strength."""
    found, last = run.certificate or {}, list(run.recipe["stages"])[-1]
    if found.get("q") == strength and "selected" in run.own.policies:
        return "selected"
    return last if strength == 1 and last in run.own.policies else None


def _measured(run: Run, strength: float) -> list[tuple[str, str, str, str, str]]:
    """Rows of metric, direction, the base's value, the policy's, its interval."""
    policy, options = policy_of(run, strength), tables.options_of(run, run.own)
    levels = {(e.policy, e.metric): e for e in run.own.estimates if e.kind == "level" and e.stratum == ALL}
    rows = []
    for (name, metric), estimate in levels.items():
        if name == policy:
            base = levels.get(("base", metric))
            title = words.metric_name(metric, tail=options["tail"], violation=options["violation"])
            before = "–" if base is None else words.number(base.value)
            rows.append(
                (title, words.direction(metric), before, words.number(estimate.value), words.interval(estimate))
            )
    return rows


def _count(run: Run, strength: float) -> dict[str, Any]:
    policy = policy_of(run, strength)
    first = next((e for e in run.own.estimates if e.policy == policy and e.stratum == ALL), None)
    confidence = tables.options_of(run, run.own)["confidence"]
    return {
        "prompts": first and first.prompts,
        "responses": first and first.responses,
        "confidence": None if confidence is None else f"{100 * confidence:g} %",
    }


def _stages(run: Run) -> list[tuple[str, str, str, str, str]]:
    """Rows of stage, method, data, number of rows, fingerprint."""
    found = []
    for number, stage in enumerate(run.stages, 1):
        about = read_json(RunFolder(run.path).stage(number, stage.name) / "data.json", [])
        rows, digest = (about.get(k, "?") for k in ("rows", "fingerprint")) if isinstance(about, dict) else ("?", "?")
        method = stage.part.get("loss") or stage.part.get("method")
        path = (stage.part.get("data") or {}).get("path", "?")
        found.append((stage.name, str(method), str(path), str(rows), str(digest)[:16]))
    return found
