"""Work that died goes on behind its last finished batch: nothing is sampled or scored twice, nothing is mistaken."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import llama, tokenizer

from stepwise.errors import CheckpointError, ScoreError
from stepwise.ledger import Ledger
from stepwise.pairing import sample_pairs
from stepwise.policy import Policy
from stepwise.sampling import Decoding, Prompts, answer, fingerprint, sample
from stepwise.scoring import BadRow, score

BATCHES: list[Any] = [[1, "é\n"], [0.1 + 0.2, None], [], {"a": [-0.0, 1e300]}]
PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1, 12], [1, 5], [1, 6, 7], [1, 9]]
DECODING = Decoding(6, batch_size=2, seed=3)  # four batches, the last of one prompt


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    found = Policy.load(str(folder), quantization="none", dtype=torch.float32)
    found.push("top", rank=4, alpha=8)
    with torch.no_grad():
        for parameter in found.top_parameters().values():
            parameter.normal_(std=0.05)
    return found


@pytest.fixture
def generated(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the batches that the model generates, and ends the work before one of them if told so."""
    state = {"count": 0, "last": 1 << 30}
    generate = policy.model.generate

    def counted(*arguments: Any, **options: Any) -> Any:
        if state["count"] == state["last"]:
            raise KeyboardInterrupt
        state["count"] += 1
        return generate(*arguments, **options)

    monkeypatch.setattr(policy.model, "generate", counted)
    return state


def filled(folder: Path) -> Path:
    part = Ledger(folder).part("p", 1)
    for batch in BATCHES:
        part.append(batch)
    return part.path


def kept(folder: Path) -> list[Any]:
    return list(Ledger(folder).part("p", 1))


def test_a_part_holds_what_an_earlier_process_appended(tmp_path: Path) -> None:
    assert kept(tmp_path / "never") == []
    filled(tmp_path)
    assert json.dumps(kept(tmp_path)) == json.dumps(BATCHES)  # -0.0 too
    Ledger(tmp_path).remove()
    assert not tmp_path.exists()


def test_wherever_a_file_is_cut_the_whole_lines_stay_and_the_rest_is_made_again(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in sorted({*range(0, len(whole), 17), *(end + shift for end in ends for shift in (-2, -1, 0, 1))}):
        path.write_bytes(whole[:size])
        lines = max(whole[:size].count(b"\n") - 1, 0)  # the head is one
        part = Ledger(tmp_path).part("p", 1)
        assert list(part) == BATCHES[:lines], size
        for batch in BATCHES[lines:]:
            part.append(batch)
        assert path.read_bytes() == whole, size


def test_a_damaged_line_ends_what_is_kept(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        lines = max(whole[:place].count(b"\n") - 1, 0)
        assert kept(tmp_path) == BATCHES[:lines], place
    lines = whole.splitlines(keepends=True)
    for other in ([0, 2, 3], [0, 2, 1], [0, 1, 1], [1, 2]):  # lost, swapped, doubled, without a head
        path.write_bytes(b"".join(lines[i] for i in other))
        assert kept(tmp_path) == (BATCHES[:1] if other[:2] == [0, 1] else [])


def test_a_part_about_something_else_is_empty_and_leaves_the_first_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    assert list(Ledger(tmp_path).part("p", 2)) == []
    assert list(Ledger(tmp_path).part("q", 1)) == []
    assert list(Ledger(tmp_path, {"p": "another scorer"}).part("p", 1)) == []
    assert kept(tmp_path) == BATCHES


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        Ledger(tmp_path / "file").part("p")


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4])
def test_sampling_goes_on_behind_the_last_batch(
    policy: Policy, generated: dict[str, int], tmp_path: Path, done: int
) -> None:
    expected = sample(policy, PROMPTS, DECODING)
    assert generated["count"] == 4
    generated.update(count=0, last=done)
    if done < 4:
        with pytest.raises(KeyboardInterrupt):
            sample(policy, PROMPTS, DECODING, ledger=Ledger(tmp_path))
    else:
        sample(policy, PROMPTS, DECODING, ledger=Ledger(tmp_path))
    assert generated["count"] == done
    generated.update(last=4)
    assert sample(policy, PROMPTS, DECODING, ledger=Ledger(tmp_path)) == expected
    assert generated["count"] == 4


def test_other_prompts_seeds_sizes_and_policies_are_not_mistaken(
    policy: Policy, generated: dict[str, int], tmp_path: Path
) -> None:
    def drawn(prompts: list[list[int]] = PROMPTS, decoding: Decoding = DECODING) -> int:
        before = generated["count"]
        assert sample(policy, prompts, decoding, ledger=Ledger(tmp_path)) == sample(policy, prompts, decoding)
        return generated["count"] - before - -(-len(prompts) // decoding.batch_size)

    assert drawn() == 4
    assert drawn() == 0
    assert drawn(PROMPTS[:-1]) == 3
    assert drawn([*PROMPTS[:-1], [1, 10]]) == 4
    assert drawn(PROMPTS[::-1]) == 4
    assert drawn(decoding=Decoding(6, batch_size=2, seed=4)) == 4
    assert drawn(decoding=Decoding(6, batch_size=3, seed=3)) == 3
    assert drawn(decoding=Decoding(7, batch_size=2, seed=3)) == 4
    assert drawn(decoding=Decoding(6, 0.9, batch_size=2, seed=3)) == 4
    with policy.using([]):
        assert drawn() == 4
    policy.scale("top", 0.5)
    assert drawn() == 4
    policy.scale("top", 1.0)
    assert drawn() == 0


def test_a_fingerprint_tells_policies_apart_by_what_they_do(policy: Policy) -> None:
    whole = fingerprint(policy)
    assert fingerprint(policy) == whole
    weight = next(iter(policy.top_parameters().values()))
    seen = {whole}
    policy.scale("top", 0.999)
    seen.add(fingerprint(policy))
    policy.scale("top", 1.0)
    with policy.using([]):
        seen.add(fingerprint(policy))
    with torch.no_grad():
        weight[0, 0] += 1e-3
        seen.add(fingerprint(policy))
        weight[0, 0] -= 1e-3
    assert len(seen) == 4


# --- scoring ---------------------------------------------------------------------------------------------------------

ROWS = 7
ASKED, SAID = [f"p{i}" for i in range(ROWS)], [f"c{i}" for i in range(ROWS)]
IDS = {"completion_ids": [[i] * (i + 1) for i in range(ROWS)]}


class Counted:
    """A scorer that counts the rows it answered, and that fails at one row."""

    def __init__(self, level: str, fails_at: int | None = None) -> None:
        self.level, self.fails_at, self.answered = level, fails_at, Counter[str]()

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[Any]:
        rows = [int(text[1:]) for text in completions]
        if self.fails_at in rows:
            raise BadRow(rows.index(self.fails_at), "it is unreadable")
        self.answered.update(completions)
        if self.level == "token":
            return [[0.1 * row for _ in ids] for row, ids in zip(rows, columns["completion_ids"], strict=True)]
        return [None if row == 2 else 0.1 * row for row in rows]


def scored(scorer: Counted, ledger: Ledger | None, **options: Any) -> list[float | None]:
    arguments = {"name": "s", "columns": IDS, "batch_size": 2, "ledger": ledger, **options}
    return score(scorer, ASKED, SAID, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("fails_at", range(ROWS))
def test_scoring_goes_on_behind_the_last_batch(tmp_path: Path, level: str, fails_at: int) -> None:
    """The error names the row; what was finished before it stays."""
    expected = scored(Counted(level), None)
    scorer = Counted(level, fails_at)
    with pytest.raises(ScoreError, match=f"unreadable. Where: scorer 's', row {fails_at}, prompt 'p{fails_at}'"):
        scored(scorer, Ledger(tmp_path))
    finished = fails_at // 2 * 2
    assert scorer.answered == Counter(SAID[:finished])
    scorer.fails_at = None
    assert scored(scorer, Ledger(tmp_path)) == expected
    assert scorer.answered == Counter(SAID)
    assert scored(scorer, Ledger(tmp_path)) == expected
    assert scorer.answered == Counter(SAID)


def test_a_batch_with_a_value_that_is_no_score_is_not_kept(tmp_path: Path) -> None:
    def broken(completions: list[str], **columns: Any) -> list[float]:
        return [float("nan") if text == "c3" else 1.0 for text in completions]

    with pytest.raises(ScoreError, match="row 3"):
        score(broken, ASKED, SAID, name="s", batch_size=2, ledger=Ledger(tmp_path))  # type: ignore[arg-type]
    (path,) = tmp_path.iterdir()
    assert len(path.read_text().splitlines()) == 2  # a head and the first batch


def test_scores_of_other_rows_scorers_and_batches_are_not_mistaken(tmp_path: Path) -> None:
    def asked(about: str = "a", level: str = "sequence", **options: Any) -> int:
        scorer = Counted(level)
        scored(scorer, Ledger(tmp_path, {"s": about, "t": about}), **options)
        return scorer.answered.total()

    assert asked() == ROWS
    assert asked() == 0
    assert asked(about="b") == ROWS
    assert asked(level="token") == ROWS
    assert asked(name="t") == ROWS
    assert asked(batch_size=3) == ROWS
    assert asked(columns={**IDS, "answer": ["x"] * ROWS}) == ROWS
    assert asked(columns={**IDS, "answer": [*["x"] * (ROWS - 1), "y"]}) == ROWS
    assert asked() == 0


# --- both ------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_same_however_often_their_making_died(
    policy: Policy, generated: dict[str, int], tmp_path: Path
) -> None:
    prompts = Prompts(["w5", "w6", "w7"], [[1, 5], [1, 6], [1, 7]], {"stratum": ["a", "b", "a"]})
    answered: Counter[str] = Counter()
    dies: dict[str, int] = {"after": 1 << 30}

    def words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if answered.total() >= dies["after"]:
            raise RuntimeError("gone")
        answered.update(completions)
        return [float(len(set(text.split()))) for text in completions]

    def made(ledger: Ledger | None) -> Any:
        how: dict[str, Any] = {"scorer": words, "name": "words", "prefer": "higher", "samples": 4, "ledger": ledger}
        return sample_pairs(policy, prompts, Decoding(12, batch_size=5, seed=1), **how)

    expected = made(None)
    batches, rows = generated["count"], Counter(answered)
    assert batches == 3
    generated["count"], dies["after"] = 0, 0
    answered.clear()
    for last in (1, 2, 3):
        generated["last"] = last
        with pytest.raises(KeyboardInterrupt if last < 3 else ScoreError):
            made(Ledger(tmp_path))
    for after in (5, 10):
        dies["after"] = after
        with pytest.raises(ScoreError, match=f"gone. Where: scorer 'words', rows {after}"):
            made(Ledger(tmp_path))
    dies["after"] = 1 << 30
    assert made(Ledger(tmp_path)) == expected
    assert generated["count"] == batches
    assert answered == rows


def test_answers_come_back_as_text_too(policy: Policy, tmp_path: Path) -> None:
    prompts = Prompts(["w5", "w6"], [[1, 5], [1, 6]], {})
    first = answer(policy, prompts, DECODING, samples=2, ledger=Ledger(tmp_path))
    again = answer(policy, prompts, DECODING, samples=2, ledger=Ledger(tmp_path))
    assert first == again == answer(policy, prompts, DECODING, samples=2)
    assert all(isinstance(response.ids, list) and response.finished in (True, False) for response in again.responses)
