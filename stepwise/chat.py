"""Talk to several policies of a run at once: the same line to each, answers as they are sampled, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepwise import pipeline
from stepwise.encoding import CHAT, tokenize_prompts
from stepwise.errors import ConfigError, ScoreError
from stepwise.formats import Messages, Prompt
from stepwise.policy import Policy
from stepwise.run_folder import RunFolder, chosen_scale
from stepwise.sampling import Decoding, context, stream
from stepwise.scoring import Scorer, score
from stepwise.targets import resolve

MARK = "{prompt}"
SANDBOX_FRAME = f"user: {MARK}\nassistant:"  # as the rows of the sandbox are written


@dataclass(frozen=True)
class Options:
    """What may be asked of a chat; None is what the run's recipe says."""

    voices: tuple[str, ...] | None = None
    strength: float | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    frame: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a policy said. costs: by name, larger is worse, None where the scorer did not judge; `unscored` says why a
    scorer failed. finished: whether the policy ended the answer itself."""

    voice: str
    text: str
    finished: bool
    costs: Mapping[str, float | None] = field(default_factory=dict)
    unscored: str | None = None


class Chat:
    """One policy in memory, heard through parts of its stack.

    frame: a text around `{prompt}` that makes a line that is typed into a prompt of the run's data; template: as of a
    recipe's model. Where prompts are conversations, every voice has its own.
    """

    def __init__(
        self,
        policy: Policy,
        voices: Sequence[str],
        costs: Mapping[str, Scorer],
        decoding: Decoding,
        *,
        template: str | None,
        frame: str = MARK,
    ) -> None:
        """Raises `ConfigError` when a voice is neither base nor an adapter, or the frame has no place for the line."""
        known = ["base", *policy.names]
        for voice in voices:
            if voice not in known:
                raise ConfigError("There is no such policy", got=repr(voice), wanted=f"some of {', '.join(known)}")
        if frame.count(MARK) != 1:
            raise ConfigError("The frame does not say where a line goes", got=repr(frame), wanted=f"{MARK} once")
        self.policy, self.voices, self.costs, self.decoding = policy, list(voices), costs, decoding
        self.template, self.frame = template, frame
        self.converses = template == CHAT or (template is None and bool(policy.tokenizer.chat_template))
        self.strength = 1.0
        self._said: dict[str, Messages] = {}
        self._answers = 0
        self.forget()

    def set_strength(self, q: float) -> None:
        """Of the top adapter. Raises `ModelError` unless it is in [0, 1]."""
        self.policy.scale(self.policy.names[-1], q)
        self.strength = q

    def forget(self) -> None:
        """Begin the conversations anew."""
        self._said = {voice: [] for voice in self.voices}

    def answer(self, voice: str, line: str, heard: Callable[[str], None]) -> Answer:
        """Sample one answer; `heard` is given every piece of text as it comes. Raises `DataError` for a line without
        tokens, or one that the template refuses."""
        asked = self._prompt(voice, line)
        longest = max(1, context(self.policy) - self.decoding.max_new_tokens)
        tokens = tokenize_prompts(
            [Prompt(asked)], self.policy.tokenizer, template=self.template, max_prompt_length=longest
        )
        self._answers += 1
        with self.policy.using(self._stack(voice)):
            ids = tokens.field("prompt_ids")[0]
            response, text = stream(self.policy, ids, self.decoding, heard, number=self._answers)
        if not isinstance(asked, str):
            self._said[voice] = [*asked, {"role": "assistant", "content": text}]
        costs, why = self._cost(asked if isinstance(asked, str) else json.dumps(asked), text, response.ids)
        return Answer(voice, text, response.finished, costs, why)

    def _prompt(self, voice: str, line: str) -> str | Messages:
        framed = self.frame.replace(MARK, line)
        return [*self._said[voice], {"role": "user", "content": framed}] if self.converses else framed

    def _stack(self, voice: str) -> list[str]:
        names = self.policy.names
        return [] if voice == "base" else names[: names.index(voice) + 1]

    def _cost(self, prompt: str, text: str, ids: list[int]) -> tuple[dict[str, float | None], str | None]:
        found, why = {}, None
        for name, scorer in self.costs.items():
            try:
                (found[name],) = score(scorer, [prompt], [text], name=name, columns={"completion_ids": [ids]})
            except ScoreError as error:  # such as one that wants a column of the data: the answer is worth having
                found[name], why = None, str(error)
        return found, why


def open_chat(run: Path, options: Options) -> Chat:
    """Load a finished run to talk to: base, the policy before the last stage and the last one, at the certified
    strength if any, with the costs of its constraints, or else of its evaluation.

    Raises `ConfigError` for a run that is not finished, and what loading policies and scorers raises.
    """
    folder = RunFolder(run)
    recipe = folder.recipe()
    pipeline.refuse_unfinished(folder, recipe)
    part = recipe.evaluate
    costs = {name: constraint.cost for name, constraint in recipe.constraints.items()} or (part.costs if part else {})
    policy = pipeline.open_policy(str(run))
    room = context(policy) // 2
    asked = options.max_new_tokens or (part.max_new_tokens if part else room)
    temperature = options.temperature if options.temperature is not None else part.temperature if part else 1.0
    chat = Chat(
        policy,
        options.voices or list(dict.fromkeys(["base", *policy.names[-2:]])),
        {name: resolve(spec) for name, spec in costs.items()},
        Decoding(min(asked, context(policy) - 1), temperature, seed=options.seed),
        template=recipe.model.template,
        frame=(options.frame or (SANDBOX_FRAME if recipe.model.base == "sandbox" else MARK)).replace("\\n", "\n"),
    )
    certified = chosen_scale(folder)
    chat.set_strength(options.strength if options.strength is not None else 1.0 if certified is None else certified)
    return chat
