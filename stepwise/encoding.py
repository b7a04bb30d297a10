"""Rows of text to rows of ids. The boundary between prompt and response is found in id space.

Texts of a dataset, and templates written in a recipe, never become control tokens: `</s>` in a response is four
characters. Control tokens come from the tokenizer's chat template, and from the one BOS and EOS set here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from stepwise.errors import ConfigError, DataError
from stepwise.formats import Answer, Example, Messages, Pair, Prompt, Text, as_messages
from stepwise.tokens import Tokens, TokensWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"  # as `template`: the tokenizer's chat template, also for prompts that are plain text
_MARK = "{prompt}"
_CHUNK = 512  # texts encoded in one call


def tokenize_pairs(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    max_length: int,
    max_prompt_length: int,
    eos_id: int | None = None,
) -> Tokens:
    """Preference pairs as `prompt_ids`, `chosen_ids`, `rejected_ids`.

    `prompt_ids` is BOS (if the tokenizer uses one) and the longest common prefix of the encoded prompt, prompt + chosen
    and prompt + rejected. A prompt longer than `max_prompt_length` keeps its end; a response ends with `eos_id`
    (default: the tokenizer's) unless it was cut to fit into `max_length` together with its prompt.

    `template`: None uses the tokenizer's chat template if prompts are conversations and plain concatenation if they are
    text; "chat" always uses the chat template; any other string must contain `{prompt}` and frames text prompts.

    Raises `DataError` when rows are no pairs, conversations meet a tokenizer without chat template, or no row is left.
    """
    pairs = [row for row in _expected(rows, Pair) if isinstance(row, Pair)]
    prompts = [pair.prompt for pair in pairs]
    encoder = _Encoder.of(tokenizer, template, prompts)
    writer = TokensWriter("prompt_ids", "chosen_ids", "rejected_ids")
    fitter = _Fitter(encoder, writer, _end(tokenizer, eos_id), max_length, max_prompt_length)
    alone = encoder.encode(prompts)
    chosen = encoder.encode(prompts, [pair.chosen for pair in pairs])
    rejected = encoder.encode(prompts, [pair.rejected for pair in pairs])
    for index, (pair, *ids) in enumerate(zip(pairs, alone, chosen, rejected, strict=True)):
        fitter.add(index, pair.columns, *ids)
    return fitter.tokens()


def tokenize_texts(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    max_length: int,
    eos_id: int | None = None,
) -> Tokens:
    """Rows for supervised learning as `prompt_ids`, `response_ids`; of a pair the chosen response.

    A text has no prompt: its `prompt_ids` are BOS, or empty where the tokenizer uses none, and `template` does not
    touch it. Otherwise as `tokenize_pairs`; a prompt that leaves no room for a response is dropped, never cut.
    """
    answers = [row for row in _expected(rows, Answer, Pair, Text) if isinstance(row, Answer | Pair)]
    prompts = [row.prompt for row in answers]
    responses = [row.chosen if isinstance(row, Pair) else row.response for row in answers]
    encoder = _Encoder.of(tokenizer, template, prompts)
    writer = TokensWriter("prompt_ids", "response_ids")
    fitter = _Fitter(encoder, writer, _end(tokenizer, eos_id), max_length, max_length)
    texts = encoder.plain([row.text for row in rows if isinstance(row, Text)])
    alone, answered = encoder.encode(prompts), encoder.encode(prompts, responses)
    for index, row in enumerate(rows):
        prompt, full = ([], next(texts)) if isinstance(row, Text) else (next(alone), next(answered))
        fitter.add(index, row.columns, prompt, full)
    return fitter.tokens()


def tokenize_prompts(
    rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, template: str | None, max_prompt_length: int
) -> Tokens:
    """Prompts to be answered as `prompt_ids`, one per row, none dropped; a long prompt keeps its end, after BOS."""
    asked = [row for row in _expected(rows, Pair, Prompt) if isinstance(row, Pair | Prompt)]
    encoder = _Encoder.of(tokenizer, template, [row.prompt for row in asked])
    writer = TokensWriter("prompt_ids")
    for index, (row, ids) in enumerate(zip(asked, encoder.encode([row.prompt for row in asked]), strict=True)):
        writer.counts.rows += 1
        writer.counts.truncated_prompts += len(encoder.bos) + len(ids) > max_prompt_length
        writer.add(index, row.columns, _keep_end(encoder.bos, ids, max_prompt_length))
    return writer.tokens()


@dataclass(frozen=True)
class _Encoder:
    """How one dataset is spelt: `encode` gives ids without BOS, `bos` is what comes before them."""

    tokenizer: PreTrainedTokenizerBase
    frame: str  # CHAT, or a text around `{prompt}`
    bos: list[int]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, template: str | None, prompts: Sequence[str | Messages]
    ) -> _Encoder:
        conversations = any(not isinstance(prompt, str) for prompt in prompts)
        frame = _MARK if template is None else template
        if template is None and conversations:
            frame = CHAT
        if frame == CHAT and not tokenizer.chat_template:
            raise DataError(
                "The rows are conversations or `template: chat` is set, but the tokenizer has no chat template",
                where=tokenizer.name_or_path or "the tokenizer",
                wanted=f"an instruction-tuned model, or text prompts and a template such as 'USER: {_MARK} ASSISTANT:'",
            )
        if frame != CHAT:
            _check_frame(frame, tokenizer, conversations)
        first = list(tokenizer("a")["input_ids"])[:1]  # what it puts before a text says whether it uses BOS
        return cls(tokenizer, frame, first if first == [tokenizer.bos_token_id] else [])

    def encode(self, prompts: Sequence[str | Messages], responses: Sequence[str] | None = None) -> Iterator[list[int]]:
        """Ids of prompts, or of prompts with their responses, without leading BOS."""
        if self.frame == CHAT:
            return (self._chat(i, p, None if responses is None else responses[i]) for i, p in enumerate(prompts))
        texts = [self.frame.replace(_MARK, cast(str, prompt)) for prompt in prompts]
        return self.plain(texts if responses is None else [a + b for a, b in zip(texts, responses, strict=True)])

    def plain(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Ids of texts as they are, nothing added, nothing in them read as a control token."""
        for start in range(0, len(texts), _CHUNK):
            yield from self.tokenizer(
                list(texts[start : start + _CHUNK]),
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]

    def _chat(self, row: int, prompt: str | Messages, response: str | None) -> list[int]:
        messages = as_messages(prompt)
        if response is not None:
            messages = [*messages, {"role": "assistant", "content": response}]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=response is None,
                sanitize_control_tokens=True,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # a template is a program: it raises what it likes, mostly about the order of roles
            roles = ", ".join(message["role"] for message in messages)
            reason = f"{type(error).__name__}: {error}; roles: {roles}"
            raise DataError(
                "The chat template refuses a row",
                where=f"good row {row + 1}",
                got=reason,
                wanted="roles in the order that the model's template allows",
            ) from error
        ids = cast(list[int], rendered)
        written = next((i for i, token in enumerate(ids) if [token] != self.bos), len(ids))
        return ids[written:]  # templates mostly write BOS themselves


@dataclass(frozen=True)
class _Fitter:
    """Splits rows at the boundary, closes them with EOS, cuts them to length, and counts what that does to them."""

    encoder: _Encoder
    writer: TokensWriter
    eos_id: int
    max_length: int
    max_prompt_length: int

    def add(self, index: int, columns: dict[str, Any], prompt: list[int], *full: list[int]) -> None:
        """Write one row, given its prompt alone and its prompt with each response; or count why it is dropped."""
        counts, bos = self.writer.counts, self.encoder.bos
        counts.rows += 1
        boundary = min(_common_prefix(prompt, ids) for ids in full)
        start = _keep_end(bos, full[0][:boundary], self.max_prompt_length)
        room = self.max_length - len(start)
        closed = [self._ended(ids[boundary:]) for ids in full]
        responses = [ids[: max(room, 0)] for ids in closed]
        for reason, found in (
            ("empty prompt", prompt and not start),
            ("empty response", any(len(ids) == boundary for ids in full)),
            ("no room for a response", room < 1),
            ("responses alike after truncation", len(responses) > 1 and responses[0] == responses[1]),
        ):
            if found:
                counts.dropped[reason] += 1
                return
        counts.boundary_moved += boundary < len(prompt)
        counts.truncated_prompts += len(bos) + boundary > self.max_prompt_length
        counts.truncated_responses += any(len(ids) > room for ids in closed)
        self.writer.add(index, columns, start, *responses)

    def tokens(self) -> Tokens:
        tokens = self.writer.tokens()
        if not len(tokens):
            wanted = f"prompts that leave room for a response within max_length {self.max_length}"
            raise DataError("No row is left after tokenising", got=tokens.counts, wanted=wanted)
        return tokens

    def _ended(self, response: list[int]) -> list[int]:
        """The response with one EOS at its end; what white space a chat template writes behind its own EOS goes."""
        if self.encoder.frame == CHAT:
            for end in range(len(response), max(len(response) - 3, 0), -1):
                if response[end - 1] == self.eos_id and self._is_space(response[end:]):
                    return response[:end]
        return [*response, self.eos_id]

    def _is_space(self, ids: list[int]) -> bool:
        return not cast(str, self.encoder.tokenizer.decode(ids)).strip()


def _keep_end(bos: list[int], ids: list[int], limit: int) -> list[int]:
    return bos + ids[max(len(bos) + len(ids) - limit, 0) :]


def _common_prefix(prompt: list[int], full: list[int]) -> int:
    if full[: len(prompt)] == prompt:  # the usual case, at the speed of C
        return len(prompt)
    return next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))


def _end(tokenizer: PreTrainedTokenizerBase, eos_id: int | None) -> int:
    found = tokenizer.eos_token_id if eos_id is None else eos_id
    if not isinstance(found, int):
        raise DataError("The tokenizer has no end token", where=tokenizer.name_or_path, wanted="one eos token id")
    return found


def _check_frame(frame: str, tokenizer: PreTrainedTokenizerBase, conversations: bool) -> None:
    if frame.count(_MARK) != 1:
        wanted = f"null, {CHAT}, or a text with {_MARK} once"
        raise ConfigError("`template` does not say where the prompt goes", got=repr(frame), wanted=wanted)
    if conversations:
        raise DataError(
            "A template text cannot hold conversations", got=repr(frame), wanted=f"template: null or {CHAT}"
        )
    if control := [token for token in tokenizer.all_special_tokens if token in frame]:
        wanted = f"template: {CHAT}, or plain words; BOS and EOS are added by themselves"
        raise ConfigError("`template` contains control tokens, which a text cannot", got=control, wanted=wanted)


def _expected(rows: Sequence[Example], *kinds: type[Example]) -> Sequence[Example]:
    for row in rows:
        if not isinstance(row, kinds):
            wanted = " or ".join(kind.__name__.lower() for kind in kinds) + " rows"
            raise DataError("Rows of this format cannot be used here", got=type(row).__name__.lower(), wanted=wanted)
    return rows
