"""Generation from the live stack of adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch

from stepwise.errors import DataError, ModelError
from stepwise.ledger import Ledger, Part, resumed
from stepwise.policy import Policy

LEG = 16  # tokens after which rows that have ended leave their batch


class Prompts(NamedTuple):
    """Prompts as text and as token ids, and the other columns of their rows, one list per column."""

    texts: list[str]
    ids: list[list[int]]
    columns: dict[str, list[Any]]

    def take(self, places: Iterable[int]) -> Prompts:
        """The prompts at these places, in this order."""
        at = list(places)
        columns = {name: [values[i] for i in at] for name, values in self.columns.items()}
        return Prompts([self.texts[i] for i in at], [self.ids[i] for i in at], columns)

    def repeat(self, samples: int) -> Prompts:
        """Every prompt `samples` times in a row."""
        return self.take(i for i in range(len(self.ids)) for _ in range(samples))


@dataclass(frozen=True)
class Decoding:
    """How to draw responses: nothing is truncated unless `top_k` or `top_p` says so; temperature 0 is greedy.

    The end token is forbidden before `min_new_tokens`. Every batch has a random stream of its own; `stream` is the
    number of the first one, for work done block by block.
    """

    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 64
    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None
    min_new_tokens: int = 0
    stream: int = 0


class Response(NamedTuple):
    """Sampled token ids, the stop token included, and whether the model stopped by itself."""

    ids: list[int]
    finished: bool


class Generate(Protocol):
    """What draws one response per prompt of a batch from the active stack, at random by torch's stream."""

    def __call__(self, policy: Policy, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[Response]: ...


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    ledger: Ledger | None = None,
    generate: Generate | None = None,
) -> list[Response]:
    """One response per prompt, drawn from the active stack by `generate`, by transformers where it is None.

    At temperature 1, with nothing truncated or forbidden, the distribution sampled from is the policy itself. A pure
    function of its arguments: every batch has its own random stream, so that what goes on from a `ledger` equals what
    was never interrupted. A batch that does not fit in memory is drawn in halves, each with a stream of its own. Raises
    `DataError` when a prompt is empty or leaves no room in the context, `ModelError` when not even one response fits.
    """
    limit = context(policy)
    for index, prompt in enumerate(prompts):
        if not prompt or len(prompt) + decoding.max_new_tokens > limit:
            raise DataError(
                "A prompt is empty" if not prompt else "A prompt does not fit into the model's context",
                where=f"prompt {index}",
                got=f"{len(prompt)} tokens + {decoding.max_new_tokens} new ones",
                wanted=f"at least 1 and at most {limit} in all",
            )
    responses: list[Response | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chunks = [by_length[start : start + decoding.batch_size] for start in range(0, len(prompts), decoding.batch_size)]

    fits = decoding.batch_size  # what did not fit is not tried again: the prompts only get longer

    def draw(number: int, chunk: list[int], half: int = 1) -> list[Response]:
        nonlocal fits
        middle = len(chunk) // 2
        if len(chunk) <= fits:
            try:
                with _random_stream(policy.device, decoding.seed, decoding.stream + number, half):
                    return (generate or _generate)(policy, [prompts[i] for i in chunk], decoding)
            except torch.OutOfMemoryError as error:
                if len(chunk) == 1:
                    raise _too_long(prompts[chunk[0]], decoding) from error
            torch.cuda.empty_cache()  # what the error held is free by now
            fits = len(chunk) - middle
        return draw(number, chunk[:middle], 2 * half) + draw(number, chunk[middle:], 2 * half + 1)

    kept: list[Any] | Part = []
    if ledger is not None:
        kept = ledger.part("responses", fingerprint(policy), policy.stop_ids, prompts, asdict(decoding))
    with policy.flattened() if generate is None else nullcontext():  # another engine is handed the stack itself
        for chunk, rows in zip(chunks, resumed(kept, chunks, draw), strict=True):
            for index, row in zip(chunk, rows, strict=True):
                responses[index] = Response(*row)
    return [r for r in responses if r is not None]


def _too_long(prompt: Sequence[int], decoding: Decoding) -> ModelError:
    return ModelError(
        "There is not enough memory for a single response",
        where="sampling",
        got=f"a prompt of {len(prompt)} tokens and up to {decoding.max_new_tokens} new ones",
        wanted="shorter prompts, a smaller max_new_tokens, `quantization: nf4`, or more free memory",
    )


def context(policy: Policy) -> int:
    """Tokens that the model can see; 2,048 where its config does not say."""
    return getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or 2048


def fingerprint(policy: Policy) -> str:
    """SHA-256 of the active stack's logits on a few tokens: of base, adapters, their strengths, dtype and kernels."""
    last = policy.model.get_input_embeddings().weight.shape[0] - 1
    ids = torch.arange(16, device=policy.device).mul(last).div(15, rounding_mode="floor").view(1, -1)
    with _evaluating(policy):
        logits = policy.model(input_ids=ids, use_cache=False).logits
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()


def stream(
    policy: Policy, prompt: Sequence[int], decoding: Decoding, heard: Callable[[str], None], *, number: int
) -> tuple[Response, str]:
    """One response to one prompt, its text given to `heard` piece by piece; the pieces, joined, are returned too.

    As `sample`; `number` is that of the random stream.
    """
    from transformers import TextStreamer

    pieces: list[str] = []

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            heard(text)

    if not prompt:
        raise DataError("A prompt is empty", wanted="at least one token")
    pieces_of = Pieces(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with _random_stream(policy.device, decoding.seed, number):
        (response,) = _generate(policy, [prompt], decoding, streamer=pieces_of)
    return response, "".join(pieces)


def _generate(
    policy: Policy, prompts: Sequence[Sequence[int]], decoding: Decoding, *, streamer: Any = None
) -> list[Response]:
    """Leg by leg: rows that have ended are left out of the next leg, the others go on from their cache."""
    from transformers import DynamicCache

    stops = set(policy.stop_ids)
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[policy.pad_id] * (width - len(p)) + list(p) for p in prompts], device=policy.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
    found: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    cache: Any = None
    leg = LEG if streamer is None else decoding.max_new_tokens
    with _evaluating(policy):
        for done in range(0, decoding.max_new_tokens, leg):
            output = policy.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=_generation(policy, decoding, done, leg),
                streamer=streamer,
            )
            for index, row in zip(going, output.sequences[:, ids.shape[1] :].tolist(), strict=True):
                found[index] += row[: next((i + 1 for i, token in enumerate(row) if token in stops), None)]
            rows = [place for place, index in enumerate(going) if found[index][-1] not in stops]
            going = [going[place] for place in rows]
            if not going:
                break
            keep = torch.tensor(rows, device=policy.device)
            ids, old = output.sequences[keep], mask[keep]
            mask = torch.cat([old, old.new_ones(len(rows), ids.shape[1] - old.shape[1])], dim=1)
            cache = output.past_key_values if isinstance(output.past_key_values, DynamicCache) else None
            if cache is not None:
                cache.batch_select_indices(keep)
    return [Response(ids, ids[-1] in stops) for ids in found]


def _generation(policy: Policy, decoding: Decoding, done: int, leg: int) -> Any:
    """What `generate` is told for the next `leg` tokens, after `done` of them."""
    from transformers import GenerationConfig

    greedy = decoding.temperature == 0
    new = min(leg, decoding.max_new_tokens - done)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new,
        do_sample=not greedy,
        temperature=None if greedy else decoding.temperature,
        top_k=None if greedy else decoding.top_k or 0,
        top_p=None if greedy else decoding.top_p or 1.0,
        min_new_tokens=min(max(decoding.min_new_tokens - done, 0), new) or None,
        eos_token_id=policy.stop_ids or None,
        pad_token_id=policy.pad_id,
        return_dict_in_generate=True,
    )


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    training = policy.module.training
    policy.module.eval()
    try:
        with torch.inference_mode(), policy.autocast():
            yield
    finally:
        policy.module.train(training)


@contextmanager
def _random_stream(device: torch.device, seed: int, number: int, half: int = 1) -> Iterator[None]:
    """Draw from a stream of its own and leave the global one untouched. `half` 1 is a whole batch, 2 and 3 its halves,
    4 to 7 theirs. The CPU's generator takes the lower 32 bits of a seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + number + (half - 1) * 2_654_435_761) % 2**63)
        yield


class Answers(NamedTuple):
    """`samples` responses to each prompt in a row: what was asked, as often as it was, and what came back."""

    asked: Prompts
    responses: list[Response]
    texts: list[str]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What a scorer is given besides prompts and completions."""
        return {**self.asked.columns, "completion_ids": [list(response.ids) for response in self.responses]}


def answer(
    policy: Policy,
    prompts: Prompts,
    decoding: Decoding,
    *,
    samples: int = 1,
    ledger: Ledger | None = None,
    generate: Generate | None = None,
) -> Answers:
    """Sample `samples` responses to each prompt from the active stack, as ids and as text; as `sample`."""
    asked = prompts.repeat(samples)
    responses = sample(policy, asked.ids, decoding, ledger=ledger, generate=generate)
    return Answers(asked, responses, [policy.tokenizer.decode(r.ids, skip_special_tokens=True) for r in responses])
