"""Before a stage that is to meet the constraints: could the policy it starts from meet them at all?

What is sampled here only warns; it moves nothing, so prompts that certify the result later may be among those asked.
"""

from __future__ import annotations

from stepwise.constraints.constraint import feasible
from stepwise.ledger import Ledger
from stepwise.recipe import PpoLagrangianStage, RsaStage
from stepwise.recipe_parts import PROMPT_FORMATS
from stepwise.sampling import Decoding, Prompts, answer
from stepwise.scoring import score
from stepwise.targets import fingerprint
from stepwise.workspace import Workspace

_PROMPTS = 100  # asked at most
_BEST_OF = 4  # responses to each: the least costly of them show what could be reached
_BATCH = 256


def warn_out_of_reach(run: Workspace, name: str) -> None:
    """Warn of every limit that even the best of four responses to each prompt, by the policy so far, does not meet.

    Asked is before a stage with a multiplier, and before the last one where its strength is to be selected.
    """
    length = _length(run, name)
    if length is None:
        return
    decoding = Decoding(length, batch_size=_BATCH, seed=run.recipe.seed)
    about = {key: fingerprint(part.cost) for key, part in run.recipe.constraints.items()}
    ledger = Ledger.beside(run.folder.path / "feasibility", about)
    for key in run.recipe.constraints:
        constraint, prompts = run.constraint(key), _prompts(run, key, name)
        answers = answer(run.policy, prompts, decoding, samples=_BEST_OF, ledger=ledger)
        costs = score(
            constraint.cost,
            answers.asked.texts,
            answers.texts,
            name=key,
            columns=answers.columns,
            batch_size=_BATCH,
            ledger=ledger,
        )
        asked = [index for index in range(len(prompts.ids)) for _ in range(_BEST_OF)]
        found = feasible(constraint, costs, asked)
        if not found.feasible:
            run.display.warn(found.message)
    ledger.remove()


def _length(run: Workspace, name: str) -> int | None:
    """Of a response, in tokens; None where the stage has no limit to meet."""
    stage, select = run.recipe.stages[name], run.recipe.select
    if isinstance(stage, RsaStage) and stage.multiplier is not None:
        return stage.multiplier.max_new_tokens
    if isinstance(stage, PpoLagrangianStage):
        return stage.max_new_tokens
    return select.max_new_tokens if select is not None and name == list(run.recipe.stages)[-1] else None


def _prompts(run: Workspace, key: str, name: str) -> Prompts:
    """Those of the constraint, else of the stage, else of the selection."""
    parts = [run.recipe.constraints[key].data, run.recipe.stages[name].data]
    parts += [] if run.recipe.select is None else [run.recipe.select.data]
    data = next(part for part in parts if part is not None and part.format in PROMPT_FORMATS)
    loaded = run.load(data)
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training_of(name).max_prompt_length)
    return prompts.take(range(min(_PROMPTS, len(prompts.ids))))
