"""What the report says in words: the certificate in one sentence with its assumptions, names of metrics, numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepwise.evaluation import Estimate

_BOUNDS = {
    "clopper-pearson": "Clopper and Pearson's bound of a rate",
    "betting": "a betting bound",
    "bonferroni": "bounds of the parts of the measure, joined by Bonferroni",
    "dkw": "the Dvoretzky-Kiefer-Wolfowitz bound",
    "bootstrap (asymptotic)": "the bootstrap, which guarantees nothing",
}
_PLAIN = {
    "kl": "KL to the supervised policy, nats",
    "nll": "NLL under the base, nats per token",
    "length": "length, tokens",
    "tokens": "length, tokens",
    "unfinished": "cut off before the end",
    "perplexity": "perplexity under the base",
    "texts/perplexity": "perplexity of held-out text",
    "distinct_1": "distinct words",
    "distinct_2": "distinct bigrams",
    "distinct_3": "distinct trigrams",
}


def number(value: float | None) -> str:
    """Three digits, as a table wants them."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        return f"{value:.2e}".replace("-", "−")
    return f"{value:,.{3 if size < 0.1 else 2 if size < 100 else 0}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A relative change."""
    return "–" if value is None else f"{100 * value:+.0f} %".replace("-", "−")


def bytes_of(value: float | None) -> str:
    """A size in GB, MB."""
    if value is None:
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def score_name(column: str) -> str:
    """cost/harm -> "cost harm"; kl -> what it is."""
    kind, slash, name = column.partition("/")
    return f"{kind.removesuffix('s')} {name}" if slash else _PLAIN.get(column, column)


def metric_name(metric: str, *, tail: float | None, violation: float | None) -> str:
    """A metric in words: cost/harm/cvar -> "cost harm, worst 10 %"."""
    parts = metric.split("/")
    if parts[0] == "cost" and len(parts) == 3:
        said = {
            "mean": "mean",
            "cvar": "mean of the worst" + (f" {100 * tail:g} %" if tail else ""),
            "violation_rate": "share of responses above" + (f" {violation:g}" if violation is not None else ""),
        }
        return f"cost {parts[1]}, {said.get(parts[2], parts[2])}"
    return score_name(metric)


def direction(metric: str) -> str:
    """Which way is better, where one is."""
    if metric.startswith(("rewards/", "distinct_")):
        return "higher is better"
    return "lower is better" if metric.startswith("cost/") or metric == "unfinished" else ""


def risk_name(risk: Mapping[str, Any]) -> str:
    """A risk measure in words: "the mean of the worst 10 %"."""
    measure = risk.get("measure")
    if measure == "mean":
        return "the mean"
    if measure == "cvar":
        return f"the mean of the worst {100 * float(risk.get('alpha', 1)):g} %"
    if measure == "worst_case":
        return "the worst case"
    options = ", ".join(f"{key} {value}" for key, value in risk.items() if key != "measure")
    return f"the {measure} risk ({options})" if options else f"the {measure} risk"


def sentence(certificate: Mapping[str, Any]) -> str:
    """The certificate in one plain sentence."""
    stage, confidence = certificate["stage"], 100 * float(certificate["confidence"])
    steps: Sequence[Mapping[str, Any]] = certificate["steps"]
    q = certificate["q"]
    if q is None:
        return (
            f"Nothing is certified: no strength of {stage} that was tried meets every limit at {confidence:g} % "
            "confidence."
        )
    told = ", and ".join(_told(check, certificate["constraints"]) for check in _checks(steps, q))
    if certificate["certified"]:
        return f"With {confidence:g} % confidence, the policy {stage} at strength {q:g} keeps {told}."
    seen = certificate.get("prompts_seen_in_training")
    why = f"{seen} of its prompts were used in training" if seen else "its bound guarantees nothing"
    return f"This is no certificate, because {why}: the policy {stage} at strength {q:g} seems to keep {told}."


def _told(check: Mapping[str, Any], constraints: Mapping[str, Any]) -> str:
    bound, name = check["bound"], check["constraint"]
    return (
        f"{risk_name(constraints[name]['risk'])} of {name} at or below {number(bound['value'])}, under its limit of "
        f"{check['limit']:g} ({number(bound['estimate'])} was seen on {bound['n']} prompts)"
    )


def _checks(steps: Sequence[Mapping[str, Any]], q: float) -> Sequence[Mapping[str, Any]]:
    checks: Sequence[Mapping[str, Any]] = next(step["checks"] for step in steps if step["q"] == q)
    return checks


def assumptions(certificate: Mapping[str, Any], select: Mapping[str, Any]) -> list[str]:
    """What the sentence rests on, one line each."""
    n = certificate["prompts"]
    found = [
        f"It is about one response per prompt, of at most {select.get('max_new_tokens', '?')} tokens, sampled from the "
        f"policy itself (temperature 1), and about prompts drawn independently from where the {n} of "
        f"{_mapping(select.get('data')).get('path', 'select.data')} come from. Other prompts, other ways to decode and "
        "people who try to break the model are not covered.",
        f"None of these prompts may have been trained on: {certificate.get('prompts_seen_in_training')} of them were "
        "found in the data of the stages.",
        "The strengths were tried in an order fixed beforehand, down to the first that failed, so choosing among those "
        "that passed costs no confidence.",
    ]
    kinds = {c["constraint"]: c["bound"]["kind"] for step in certificate["steps"] for c in step["checks"]}
    for name, part in certificate["constraints"].items():
        ends = part.get("range")
        known = f"that lies between {ends[0]:g} and {ends[1]:g}, which was known beforehand" if ends else "of any size"
        kind = kinds.get(name, "")
        found.append(
            f"{name} is what {part['cost']} (SHA-256 {str(part['cost_sha256'])[:12]}) says it is, a cost {known}; what "
            f"that scorer does not see is not bounded. Method: {_BOUNDS.get(kind, kind)}."
        )
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def interval(estimate: Estimate, say: Any = number) -> str:
    """The ends of an interval; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{say(estimate.low)} … {say(estimate.high)}"
