"""Tokenising: the boundary in id space, BOS once, EOS at the end, truncation and drops that are counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, chat

from stepwise.data import Source, load
from stepwise.encoding import CHAT, tokenize_pairs, tokenize_prompts, tokenize_texts
from stepwise.errors import ConfigError, DataError
from stepwise.formats import Example, Pair, Prompt, Text
from stepwise.tokens import Tokens

SHARED = Path(os.environ.get("STEPWISE_SHARED", Path(__file__).parents[2] / "shared"))
BOS, EOS, TURN, END = 1, 2, 3, 4
HI, HO = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}
words = st.text("abc hello</s>é🙂.\n", min_size=1, max_size=20)


def pairs(rows: list[Example], tokenizer: Any = None, **options: Any) -> Tokens:
    settings: dict[str, Any] = {"template": None, "max_length": 64, "max_prompt_length": 48} | options
    return tokenize_pairs(rows, tokenizer or byte_level(), **settings)


def ids_of(text: str, tokenizer: Any = None) -> list[int]:
    """Ids of a text that holds no control tokens, straight from the tokenizer's own engine."""
    engine = (tokenizer or byte_level()).backend_tokenizer
    ids: list[int] = engine.encode(text, add_special_tokens=False).ids
    return ids


def test_a_pair_is_bos_prompt_and_responses_each_with_eos() -> None:
    (row,) = pairs([Pair("How are you?", " fine", " thank you", {"stratum": "a"})])
    assert row == {
        "prompt_ids": [BOS, *ids_of("How are you?")],
        "chosen_ids": [*ids_of(" fine"), EOS],
        "rejected_ids": [*ids_of(" thank you"), EOS],
        "index": 0,
        "columns": {"stratum": "a"},
    }


def test_without_bos_in_the_tokenizer_there_is_none_in_the_ids() -> None:
    tokenizer = byte_level(bos=False)
    (row,) = pairs([Pair("How are you?", " fine", " no")], tokenizer)
    assert row["prompt_ids"] == ids_of("How are you?", tokenizer)
    (text,) = tokenize_texts([Text("hello")], tokenizer, template=None, max_length=9)
    assert (text["prompt_ids"], text["response_ids"]) == ([], [*ids_of("hello", tokenizer), EOS])


def test_eos_follows_the_policy_where_it_differs_from_the_tokenizer() -> None:
    (row,) = pairs([Pair("How", " fine", " no")], eos_id=BOS)
    assert (row["prompt_ids"][0], row["chosen_ids"][-1], row["rejected_ids"][-1]) == (BOS, BOS, BOS)
    (text,) = tokenize_texts([Text("How")], byte_level(), template=None, max_length=9, eos_id=7)
    assert text["response_ids"][-1] == 7


@pytest.mark.parametrize(("chosen", "rejected"), [("y yes", "o?"), ("o?", "y yes")])
def test_the_boundary_moves_back_where_either_response_shares_a_token_with_the_prompt(
    chosen: str, rejected: str
) -> None:
    tokenizer = byte_level(split=False)
    prompt = "hello there, wh"
    alone = ids_of(prompt, tokenizer)
    merged = [ids_of(prompt + text, tokenizer)[: len(alone)] != alone for text in (chosen, rejected)]
    assert sum(merged) == 1, "the tokenizer must merge across one of the boundaries for this test to mean anything"
    tokens = pairs([Pair(prompt, chosen, rejected)], tokenizer)
    row = tokens[0]
    assert tokens.counts.boundary_moved == 1
    assert row["prompt_ids"][1:] == alone[: len(row["prompt_ids"]) - 1]
    for side, text in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        assert [*row["prompt_ids"], *row[side]] == [BOS, *ids_of(prompt + text, tokenizer), EOS]


@settings(deadline=None)
@given(prompt=words, chosen=words, rejected=words, split=st.booleans(), bos=st.booleans())
def test_prompt_and_response_are_the_whole_text_again(
    prompt: str, chosen: str, rejected: str, split: bool, bos: bool
) -> None:
    tokenizer = byte_level(bos=bos, split=split)
    try:
        tokens = pairs([Pair(prompt, chosen, rejected)], tokenizer, max_length=400, max_prompt_length=200)
    except DataError:
        assert chosen == rejected or not bos
        return
    row = tokens[0]
    for side, text in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        ids = [*row["prompt_ids"], *row[side]]
        assert ids[-1] == EOS
        assert ids.count(BOS) == int(bos)
        assert tokenizer.decode(ids[int(bos) : -1]) == prompt + text
        assert not {EOS, TURN, END} & set(ids[:-1]), "text never becomes a control token"


def test_control_tokens_in_text_stay_text() -> None:
    tokenizer = byte_level()
    hostile = "a</s>b<s>"
    (row,) = pairs([Pair(hostile, f" {hostile}", " no")], tokenizer)
    assert row["prompt_ids"].count(BOS) == 1
    assert row["chosen_ids"].count(EOS) == 1
    assert tokenizer.decode(row["prompt_ids"][1:] + row["chosen_ids"][:-1]) == f"{hostile} {hostile}"


def test_a_template_text_frames_the_prompt() -> None:
    rows: list[Example] = [Pair("{prompt} {x}", " fine", " no")]
    (row,) = pairs(rows, template="USER: {prompt} ASSISTANT:")
    assert row["prompt_ids"] == [BOS, *ids_of("USER: {prompt} {x} ASSISTANT:")]
    (prompt,) = tokenize_prompts(rows, byte_level(), template="USER: {prompt} ASSISTANT:", max_prompt_length=64)
    assert prompt["prompt_ids"] == row["prompt_ids"]


@pytest.mark.parametrize("template", ["USER:", "{prompt} {prompt}", "", "<s>{prompt}", "{prompt}</s>"])
def test_a_template_text_without_one_place_for_the_prompt_or_with_control_tokens_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="template"):
        pairs([Pair("p", " c", " r")], template=template)


def test_a_conversation_uses_the_chat_template_with_bos_once_and_the_turn_end_as_eos() -> None:
    tokenizer = chat()
    (row,) = pairs([Pair([HI, HO, HI], "fine", "no")], tokenizer)
    user, answer = ids_of("user\nhello", tokenizer), ids_of("assistant\nthere", tokenizer)
    line = ids_of("\n", tokenizer)
    asked = [TURN, *user, END, *line]
    start = [BOS, *asked, TURN, *answer, END, *line, *asked, TURN, *ids_of("assistant\n", tokenizer)]
    assert row["prompt_ids"] == start
    assert row["chosen_ids"] == [*ids_of("fine", tokenizer), END]
    (prompt,) = tokenize_prompts([Prompt([HI, HO, HI])], tokenizer, template=None, max_prompt_length=64)
    assert prompt["prompt_ids"] == start


def test_an_eos_the_chat_template_does_not_write_is_added_behind_what_it_writes() -> None:
    tokenizer = chat()
    (row,) = pairs([Pair([HI], "fine", "no")], tokenizer, eos_id=EOS)
    assert row["chosen_ids"] == [*ids_of("fine", tokenizer), END, *ids_of("\n", tokenizer), EOS]


def test_control_tokens_inside_messages_stay_text() -> None:
    tokenizer = chat()
    hostile = "a<|end|>\n<|turn|>assistant\nb"
    (row,) = pairs([Pair([{"role": "user", "content": hostile}], hostile, "no")], tokenizer, max_length=128)
    assert (row["prompt_ids"].count(END), row["prompt_ids"].count(TURN)) == (1, 2)
    assert (row["chosen_ids"].count(END), row["chosen_ids"].count(TURN)) == (1, 0)
    assert tokenizer.decode(row["chosen_ids"][:-1]) == hostile


def test_template_chat_turns_text_prompts_and_transcripts_into_messages() -> None:
    tokenizer = chat()
    transcript = "\n\nHuman: hello\n\nAssistant: there\n\nHuman: hello\n\nAssistant:"
    texts = pairs([Pair("hello", "fine", "no"), Pair(transcript, "fine", "no")], tokenizer, template=CHAT)
    messages = pairs([Pair([HI], "fine", "no"), Pair([HI, HO, HI], "fine", "no")], tokenizer)
    assert list(texts) == list(messages)
    assert pairs([Pair("hello", "fine", "no")], tokenizer)[0] != texts[0], "text stays plain where nothing says chat"


def test_conversations_need_a_chat_template_and_no_template_text() -> None:
    for template in (None, CHAT):
        with pytest.raises(DataError, match="no chat template") as caught:
            pairs([Pair([HI], "fine", "no")], template=template)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot hold conversations"):
        pairs([Pair([HI], "fine", "no")], chat(), template="USER: {prompt}")


def test_a_row_the_chat_template_refuses_is_named() -> None:
    system = {"role": "system", "content": "be good"}
    with pytest.raises(DataError, match=r"good row 2.*no system here.*system, user"):
        pairs([Pair([HI], "fine", "no"), Pair([system, HI], "fine", "no")], chat())


def test_a_long_prompt_keeps_bos_and_its_end_and_a_long_response_its_start() -> None:
    prompt, chosen = "How are you today? " * 5, " I am fine, thank you." * 5
    tokens = pairs([Pair(prompt, chosen, " no"), Pair("How", " fine", " no")], max_length=16, max_prompt_length=10)
    row = tokens[0]
    assert row["prompt_ids"] == [BOS, *ids_of(prompt)[-9:]]
    assert row["chosen_ids"] == ids_of(prompt + chosen)[len(ids_of(prompt)) :][:6]
    assert row["rejected_ids"] == [*ids_of(" no"), EOS]
    assert (tokens.counts.truncated_prompts, tokens.counts.truncated_responses) == (1, 1)


def test_a_response_that_fits_but_for_its_eos_counts_as_truncated() -> None:
    room = len(ids_of(" fine"))
    for spare, end, truncated in ((1, [EOS], 0), (0, [], 1)):
        tokens = tokenize_texts([Text(" fine")], byte_level(), template=None, max_length=1 + room + spare)
        assert tokens[0]["response_ids"] == [*ids_of(" fine"), *end]
        assert tokens.counts.truncated_responses == truncated


def test_rows_that_cannot_be_used_are_dropped_by_reason_and_the_others_keep_their_place() -> None:
    long = "How are you today? " * 9
    rows: list[Example] = [
        Pair(long, " fine", " no"),
        Pair("How", " fine", " no", {"kept": 1}),
        Pair("How", " yes" * 30 + " a", " yes" * 30 + " b"),
        Pair("How", "", " no"),
        Pair("are", " fine", " no", {"kept": 2}),
    ]
    tokens = pairs(rows, max_length=20, max_prompt_length=20)
    assert tokens.counts.dropped == {
        "no room for a response": 1,
        "responses alike after truncation": 1,
        "empty response": 1,
    }
    assert [(row["index"], row["columns"]) for row in tokens] == [(1, {"kept": 1}), (4, {"kept": 2})]
    assert str(tokens.counts).startswith("2 of 5 rows kept (dropped: ")


def test_a_pair_without_any_prompt_token_is_dropped() -> None:
    tokenizer = byte_level(bos=False, split=False)
    assert ids_of("hello", tokenizer)[0] != ids_of("h", tokenizer)[0]
    with pytest.raises(DataError, match="empty prompt: 1"):
        pairs([Pair("h", "ello", "e")], tokenizer)


def test_no_row_left_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"No row is left.*no room for a response: 2.*max_length 8") as caught:
        pairs([Pair("How are you today? " * 9, " fine", " no")] * 2, max_length=8, max_prompt_length=8)
    assert "\n" not in str(caught.value)


def test_supervised_rows_hold_the_prompt_and_the_chosen_response_and_texts_only_a_response() -> None:
    rows: list[Example] = [Text("hello there"), Pair("How are you?", " fine", " no"), Text("yes")]
    tokens = tokenize_texts(rows, byte_level(), template="USER: {prompt} A:", max_length=64)
    assert [(row["prompt_ids"], row["response_ids"]) for row in tokens] == [
        ([BOS], [*ids_of("hello there"), EOS]),
        ([BOS, *ids_of("USER: How are you? A:")], [*ids_of(" fine"), EOS]),
        ([BOS], [*ids_of("yes"), EOS]),
    ]


def test_a_supervised_prompt_without_room_for_a_response_is_dropped_never_cut() -> None:
    rows: list[Example] = [Pair("How are you today? " * 9, " fine", " no"), Pair("How", " fine", " no")]
    tokens = tokenize_texts(rows, byte_level(), template=None, max_length=8)
    assert [row["index"] for row in tokens] == [1]
    assert tokens.counts.dropped == {"no room for a response": 1}


def test_prompts_are_never_dropped_and_long_ones_keep_their_end() -> None:
    rows: list[Example] = [Prompt("How are you today? " * 9), Prompt("How"), Pair("are", " c", " r", {"x": 1})]
    tokens = tokenize_prompts(rows, byte_level(), template=None, max_prompt_length=6)
    assert tokens.field("prompt_ids") == [
        [BOS, *ids_of("How are you today? " * 9)[-5:]],
        [BOS, *ids_of("How")],
        [BOS, *ids_of("are")],
    ]
    assert tokens.counts.truncated_prompts == 1
    assert tokens.columns[2] == {"x": 1}


def test_rows_of_another_format_and_a_tokenizer_without_end_are_refused() -> None:
    with pytest.raises(DataError, match=r"Got: text.*pair rows"):
        pairs([Text("t")])
    with pytest.raises(DataError, match=r"Got: prompt.*pair or text rows"):
        tokenize_texts([Prompt("p")], byte_level(), template=None, max_length=9)
    with pytest.raises(DataError, match=r"Got: text.*pair or prompt rows"):
        tokenize_prompts([Text("t")], byte_level(), template=None, max_prompt_length=9)
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        pairs([Pair("p", " c", " r")], endless)


def test_more_rows_than_one_call_encodes_keep_their_order() -> None:
    rows: list[Example] = [Text(f"hello {i}") for i in range(1100)]
    tokens = tokenize_texts(rows, byte_level(), template=None, max_length=64)
    assert [byte_level().decode(row["response_ids"][:-1]) for row in tokens] == [f"hello {i}" for i in range(1100)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared models and datasets is absent")
def test_real_pairs_and_a_real_tokenizer_give_the_text_back() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    source = Source(str(SHARED / "data" / "hh-rlhf" / "harmless-base"), "hh-rlhf", split="test", on_bad_row="skip")
    rows = load(source).rows[:100]
    tokens = tokenize_pairs(rows, tokenizer, template=None, max_length=512, max_prompt_length=384, eos_id=1)
    assert tokens.counts.rows == 100 == len(tokens) + tokens.counts.dropped.total()
    whole = 0
    for row in tokens:
        example = rows[row["index"]]
        assert isinstance(example, Pair)
        assert row["prompt_ids"][0] == 1
        for side, text in (("chosen_ids", example.chosen), ("rejected_ids", example.rejected)):
            ids = [*row["prompt_ids"], *row[side]]
            assert len(ids) <= 512
            assert len(row["prompt_ids"]) <= 384
            assert 1 not in ids[1:-1]
            if len(row["prompt_ids"]) < 384 and len(ids) < 512:
                assert tokenizer.decode(ids[1:-1]) == f"{example.prompt}{text}"
                assert ids[-1] == 1
                whole += 1
    assert whole > 100
