"""Sequence classifiers and published score models as scorers, against hidden states and heads multiplied by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import BOS, EOS, PAD, VOCABULARY, tokenizer, words
from small_tokenizers import byte_level, chat
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from stepwise.classifier import TextReader, batches, end_logits, load_classifier, padded
from stepwise.errors import ConfigError, ModelError
from stepwise.quantization import count_linear_4bit
from stepwise.scoring import score

PROMPTS = [words([5, 6, 7]), words([9]), words([3, 8, 4, 100, 60]), words([20, 21])]
COMPLETIONS = [words([11, 12]), words([90, 91, 92, 93, 94, 95, 96]), words([33]), words([44, 45, 46])]
IDS = [[5, 6, 7, 11, 12], [9, 90, 91, 92, 93, 94, 95, 96], [3, 8, 4, 100, 60, 33], [20, 21, 44, 45, 46]]
SPACED = "{prompt} {completion}"  # the tokenizer of these tests splits at blanks


def llama_config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=more.pop("vocab_size", VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **more},
    )


def gpt2_config(**more: Any) -> GPT2Config:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=PAD, **sizes, **more)


def bert_config(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=PAD,
        **more,
    )


def saved(folder: Path, kind: Any, config: Any, *, spell: Any = None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    (tokenizer() if spell is None else spell).save_pretrained(folder)
    return folder


def last_hidden(folder: Path, ids: list[int]) -> Tensor:
    """Of the last token of one text without padding, in float64 (H,)."""
    with torch.no_grad():
        return AutoModel.from_pretrained(folder, dtype=torch.float64)(torch.tensor([ids])).last_hidden_state[0, -1]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def one_label(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("one"), LlamaForSequenceClassification, llama_config(num_labels=1))


@pytest.mark.parametrize(
    ("kind", "config"),
    [(LlamaForSequenceClassification, llama_config), (GPT2ForSequenceClassification, gpt2_config)],
    ids=["llama", "gpt2"],
)
def test_one_label_gives_the_raw_logit_of_the_last_token(kind: Any, config: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, config(num_labels=1))
    found = load_classifier(str(folder), template=SPACED)(PROMPTS, COMPLETIONS)
    expected = [float(last_hidden(folder, ids) @ weights(folder)["score.weight"][0]) for ids in IDS]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_end_is_read_where_the_padding_is_the_end_token(tmp_path: Path) -> None:
    spell = tokenizer()
    spell.pad_token = "</s>"
    folder = saved(tmp_path, LlamaForSequenceClassification, llama_config(num_labels=1, pad_token_id=EOS), spell=spell)
    head = weights(folder)["score.weight"][0]
    at_end = [float(last_hidden(folder, [*ids, EOS]) @ head) for ids in IDS]
    before = [float(last_hidden(folder, ids) @ head) for ids in IDS]
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        ids_BT, mask_BT = padded([[*ids, EOS] for ids in IDS], EOS)
        theirs = plain(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].tolist()
    assert theirs == pytest.approx(before, abs=1e-4)  # the trap: transformers reads the token before the end
    assert [x > 0 for x in before] != [x > 0 for x in at_end]  # and with it, here, another sign
    found = load_classifier(str(folder), template=f"{SPACED}</s>")(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(at_end, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("right", [0, 2])
def test_the_last_position_of_the_mask_is_read_whichever_side_is_padded(left: int, right: int) -> None:
    hidden_BTH = torch.randn(2, left + 4 + right, 8)
    mask_BT = torch.tensor([[0] * left + [1] * 4 + [0] * right, [0] * left + [1] * 2 + [0] * (2 + right)])
    head = torch.nn.Linear(8, 3)
    expected = torch.stack([hidden_BTH[0, left + 3], hidden_BTH[1, left + 1]]) @ head.weight.T + head.bias
    torch.testing.assert_close(end_logits(hidden_BTH, mask_BT, head), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_depends_neither_on_its_neighbours_nor_on_the_side_of_the_padding(
    side: str, one_label: Path, tmp_path: Path
) -> None:
    shutil.copytree(one_label, tmp_path / "model")
    spell = tokenizer()
    spell.padding_side = side
    spell.save_pretrained(tmp_path / "model")
    prompts, completions = PROMPTS * 2, [*COMPLETIONS, *(words([i] * (i - 4)) for i in (5, 24, 80, 99))]
    together = load_classifier(str(tmp_path / "model"), template=SPACED, batch_size=8)
    found = score(together, prompts, completions, name="mine")
    alone = score(together, prompts, completions, name="mine", batch_size=1)
    assert found == pytest.approx(alone, abs=1e-5)
    in_twos = load_classifier(str(one_label), template=SPACED, batch_size=2)(prompts, completions)
    assert in_twos == pytest.approx(alone, abs=1e-5)


def test_batches_hold_rows_and_tokens_up_to_a_limit() -> None:
    lengths = [2, 3, 3, 4, 9, 30]
    assert list(batches(range(6), lengths, size=3, tokens=12)) == [[0, 1, 2], [3], [4], [5]]
    assert list(batches(range(6), lengths, size=4, tokens=None)) == [[0, 1, 2, 3], [4, 5]]
    assert list(batches([], lengths, size=3, tokens=12)) == []


@pytest.mark.parametrize("config", [bert_config, llama_config], ids=["bert", "llama"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_several_labels_give_the_probability_of_the_chosen_one(config: Any, problem: str, tmp_path: Path) -> None:
    names = {0: "calm", 1: "rude", 2: "toxic"}
    made = config(num_labels=3, id2label=names, label2id={n: i for i, n in names.items()}, problem_type=problem)
    kind = BertForSequenceClassification if isinstance(made, BertConfig) else LlamaForSequenceClassification
    folder = saved(tmp_path, kind, made)
    with torch.no_grad():  # one text at a time: no padding, no pooling by its id
        plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
        logits = [plain(torch.tensor([ids])).logits[0].tolist() for ids in IDS]
    for label, index in (("rude", 1), (2, 2), ("0", 0)):
        found = load_classifier(str(folder), label=label, template=SPACED)(PROMPTS, COMPLETIONS)
        if problem.startswith("multi"):
            expected = [1 / (1 + math.exp(-row[index])) for row in logits]
        else:
            expected = [math.exp(row[index]) / sum(map(math.exp, row)) for row in logits]
        assert found == pytest.approx(expected, abs=1e-5)
        raw = load_classifier(str(folder), label=label, output="logit", template=SPACED)(PROMPTS, COMPLETIONS)
        assert raw == pytest.approx([row[index] for row in logits], abs=1e-5)
    with pytest.raises(ModelError, match=r"Got: no label.*0 calm, 1 rude, 2 toxic"):
        load_classifier(str(folder))
    with pytest.raises(ModelError, match=r"label 'angry'.*0 calm, 1 rude, 2 toxic"):
        load_classifier(str(folder), label="angry")


def test_a_label_of_a_model_with_one_is_refused(one_label: Path) -> None:
    with pytest.raises(ModelError, match=r"label 'LABEL_0'.*Wanted: no label"):
        load_classifier(str(one_label), label="LABEL_0")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_head_that_would_be_random_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, LlamaForCausalLM, llama_config())
    with pytest.raises(ModelError, match=r"would be random.*score\.weight.*trained as a classifier"):
        load_classifier(str(folder), label=0)


def test_a_model_that_is_not_there_or_pickled_is_one_clear_error(one_label: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not be loaded"):
        load_classifier(str(tmp_path / "nothing"))
    shutil.copytree(one_label, tmp_path / "model")
    torch.save(load_file(one_label / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_classifier(str(tmp_path / "model"))


def test_four_bits_leave_the_head_alone_and_score_the_same_every_time(one_label: Path) -> None:
    whole = load_classifier(str(one_label), template=SPACED)(PROMPTS, COMPLETIONS)
    four = load_classifier(str(one_label), template=SPACED, quantization="nf4")
    found = four(PROMPTS, COMPLETIONS)
    assert found == four(PROMPTS, COMPLETIONS)
    assert found != whole
    decoder, head = (cell.cell_contents for cell in four._logits.__closure__)  # type: ignore[union-attr, attr-defined]
    assert count_linear_4bit(decoder) == 14
    assert type(head) is torch.nn.Linear and head.weight.dtype == torch.float32
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in decoder.modules())


# --- texts -----------------------------------------------------------------------------------------------------------


def bert_tokenizer() -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(3, VOCABULARY))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", marks)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.mark.parametrize(
    ("spell", "template", "expected"),
    [
        (tokenizer, SPACED, [5, 6, 11, 12, 13]),
        (tokenizer, f"w70 {SPACED}</s>", [70, 5, 6, 11, 12, 13, EOS]),
        (tokenizer, "{completion}", [11, 12, 13]),
        (bert_tokenizer, SPACED, [1, 5, 6, 11, 12, 13, 2]),
        (bert_tokenizer, f"{SPACED}[SEP]", [1, 5, 6, 11, 12, 13, 2]),  # once
    ],
)
def test_a_text_gets_what_its_tokenizer_and_template_add(
    spell: Callable[[], Any], template: str, expected: list[int]
) -> None:
    reader = TextReader.of(spell(), template, max_length=100)
    (found,) = reader.read([words([5, 6])], [words([11, 12, 13])])
    assert (found.ids, found.cut) == (expected, False)


def test_a_long_text_keeps_its_end_and_is_counted(tmp_path: Path) -> None:
    reader = TextReader.of(bert_tokenizer(), SPACED, max_length=5)
    found = reader.read([words([5, 6]), words([7])], [words([11, 12, 13]), words([14, 15])])
    assert [(text.ids, text.cut) for text in found] == [([1, 11, 12, 13, 2], True), ([1, 7, 14, 15, 2], False)]
    folder = saved(tmp_path, BertForSequenceClassification, bert_config(num_labels=1), spell=bert_tokenizer())
    scorer = load_classifier(str(folder), template=SPACED, max_length=5)
    assert scorer.truncated == 0
    long, end = scorer([words([5, 6]), words([11])], [words([11, 12, 13]), words([12, 13])])
    assert long == pytest.approx(end, abs=1e-6)
    assert scorer.truncated == 1
    unlimited = load_classifier(str(folder), template=SPACED, max_length=10**6)  # the model has 64 positions
    assert unlimited([""], [words([7] * 90)]) == pytest.approx(unlimited([""], [words([7] * 62)]), abs=1e-6)
    assert unlimited.truncated == 1


def test_control_tokens_in_data_are_characters() -> None:
    spell = byte_level()
    (found,) = TextReader.of(spell, "{prompt}: {completion}</s>", max_length=100).read(["a</s>"], ["b<s>{prompt}"])
    assert found.ids[0] == spell.bos_token_id
    assert found.ids[-1] == spell.eos_token_id
    assert not {spell.bos_token_id, spell.eos_token_id} & set(found.ids[1:-1])
    assert spell.decode(found.ids[1:-1]) == "a</s>: b<s>{prompt}"


@pytest.mark.parametrize(
    "template", ["{prompt}", "{completion}{completion}", "<s>{completion}", "{prompt}</s>{completion}"]
)
def test_a_wrong_template_is_refused(template: str, one_label: Path) -> None:
    with pytest.raises(ConfigError, match="template of a classifier"):
        load_classifier(str(one_label), template=template)


def test_the_chat_template_is_used_where_there_is_one() -> None:
    spell = chat()
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    prompts = ["hello", json.dumps([*asked, {"role": "user", "content": "why"}])]
    one, two = TextReader.of(spell, None, max_length=500).read(prompts, ["no", "no"])
    assert spell.decode(one.ids) == "<s><|turn|>user\nhello<|end|>\n<|turn|>assistant\nno<|end|>\n"
    assert spell.decode(two.ids).count("<|turn|>") == 4
    assert two.ids.count(spell.bos_token_id) == 1  # re-tokenising what a chat template wrote would double it


def test_a_text_without_a_token_is_not_scored(one_label: Path) -> None:
    scorer = load_classifier(str(one_label))
    assert scorer([], []) == []
    found = scorer(["", words([5])], ["", ""])
    assert found[0] is None and found[1] is not None


# --- published score models ------------------------------------------------------------------------------------------


def beaver(folder: Path, *, shards: bool = False, **config: Any) -> Path:
    """A decoder with score_head and normaliser in the layout of the published models."""
    torch.manual_seed(3)
    made = llama_config(vocab_size=420, architectures=["LlamaForScore"])
    model = LlamaModel(made)
    spell = byte_level(pad="<pad>")
    spell.save_pretrained(folder)
    made.save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForScore"], "score_dim": 1}
    (folder / "config.json").write_text(json.dumps(about | config))
    decoder = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    head = {"score_head.weight": torch.randn(1, 64) / 8, "score_head.bias": torch.tensor([0.7])}
    head |= {"normalizer.mean": torch.tensor([1.5]), "normalizer.var": torch.tensor([4.0])}
    if not shards:
        save_file(decoder | head, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for name, part in zip(names, (decoder, head), strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {key: name for name, part in zip(names, (decoder, head), strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


QUESTIONS, ANSWERS = ["hello", "why", "are you there"], ["no", "yes, yesterday", "thank you"]


def end_scores(folder: Path) -> list[float]:
    """score_head of the hidden state at the end token, by hand in float64."""
    torch.manual_seed(3)
    spell, model = byte_level(), LlamaModel(llama_config(vocab_size=420)).double()
    weight = (torch.randn(1, 64) / 8).double()
    found = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        ids = spell(f"BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}</s>")["input_ids"]
        assert (ids[0], ids[-1]) == (spell.bos_token_id, spell.eos_token_id)
        with torch.no_grad():
            found.append(float(model(torch.tensor([ids])).last_hidden_state[0, -1] @ weight[0]) + 0.7)
    return found


@pytest.mark.parametrize("shards", [False, True])
def test_a_published_score_model_gives_its_end_score_with_bias(shards: bool, tmp_path: Path) -> None:
    folder = beaver(tmp_path, shards=shards, score_type="cost")
    expected = end_scores(folder)
    found = load_classifier(str(folder))(QUESTIONS, ANSWERS)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert load_classifier(str(folder), batch_size=1)(QUESTIONS, ANSWERS) == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("name", ["LlamaForScore", "LlamaModelForScore"])
def test_the_normaliser_shifts_a_reward_and_keeps_the_sign_of_a_cost(name: str, tmp_path: Path) -> None:
    raw = end_scores(tmp_path)
    how = {"do_normalize": True, "architectures": [name]}
    reward = load_classifier(str(beaver(tmp_path / "reward", score_type="reward", **how)))(QUESTIONS, ANSWERS)
    assert reward == pytest.approx([(x - 1.5) / (2 + 1e-8) for x in raw], rel=1e-4, abs=1e-4)
    cost = load_classifier(str(beaver(tmp_path / "cost", score_type="cost", **how)))(QUESTIONS, ANSWERS)
    assert cost == pytest.approx([x / (2 + 1e-8) for x in raw], rel=1e-4, abs=1e-4)
    assert any(0 < x < 1.5 for x in raw)  # where a shift would have turned the sign
    with pytest.raises(ModelError, match="score_type critic"):
        load_classifier(str(beaver(tmp_path / "critic", score_type="critic", **how)))


def test_a_score_model_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = beaver(tmp_path)
    rest = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("score_head")}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"one score.*score_head\.weight.*no such tensor"):
        load_classifier(str(folder))
