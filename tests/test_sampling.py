"""Sampling: a pure function of its arguments, from the policy's own distribution."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from small_models import EOS, llama, tokenizer

from stepwise.errors import DataError, ModelError
from stepwise.policy import Policy
from stepwise.sampling import LEG, Decoding, Prompts, Response, sample


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Policy.load(str(folder), quantization="none", dtype=torch.float32)


PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1, 12]]


def test_equal_arguments_give_equal_responses_and_leave_the_global_stream_alone(policy: Policy) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = sample(policy, PROMPTS, Decoding(12, batch_size=2, seed=3))
    assert torch.equal(torch.rand(3), expected)
    assert sample(policy, PROMPTS, Decoding(12, batch_size=2, seed=3)) == first
    assert sample(policy, PROMPTS, Decoding(12, batch_size=2, seed=4)) != first
    sample(policy, PROMPTS, Decoding(2, seed=2**32 * 1_000_003))  # what a stage makes of a large seed


def test_a_batch_that_does_not_fit_is_drawn_in_halves(policy: Policy) -> None:
    """The room is for two rows; a response is the first token of its prompt, then what the batch's stream draws."""
    sizes, refused = [], []

    def cramped(policy: Policy, prompts: Sequence[Sequence[int]], decoding: Decoding, room: int = 2) -> list[Response]:
        if len(prompts) > room:
            refused.append(len(prompts))
            raise torch.OutOfMemoryError
        sizes.append(len(prompts))
        return [Response([prompt[1], int(torch.randint(10**9, ()))], True) for prompt in prompts]

    asked = [[1, number] for number in range(3, 14)]
    found = sample(policy, asked, Decoding(4, batch_size=7, seed=3), generate=cramped)
    assert [response.ids[0] for response in found] == [prompt[1] for prompt in asked]
    assert sorted(sizes) == [1, 2, 2, 2, 2, 2] and len({response.ids[1] for response in found}) == len(asked)
    assert refused == [7, 3]  # what is known not to fit is halved at once
    assert sample(policy, asked, Decoding(4, batch_size=7, seed=3), generate=cramped) == found
    with pytest.raises(ModelError, match=r"a single response.*a prompt of 2 tokens and up to 4"):
        sample(policy, asked, Decoding(4), generate=partial(cramped, room=0))


def test_batches_of_one_prompt_twice_are_drawn_apart(policy: Policy) -> None:
    responses = sample(policy, [[1, 5]] * 4, Decoding(16, batch_size=2))
    assert len({tuple(r.ids) for r in responses}) == 4


def test_first_tokens_follow_the_policy_at_temperature_one(policy: Policy) -> None:
    draws = 4000
    responses = sample(policy, [[1, 5, 6]] * draws, Decoding(1, batch_size=1000))
    found = Counter(r.ids[0] for r in responses)
    with torch.no_grad():
        p = policy.model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, -1].double().softmax(-1)
    for token in p.topk(5).indices.tolist():
        spread = float((p[token] * (1 - p[token]) / draws).sqrt())
        assert abs(found[token] / draws - float(p[token])) < 4.5 * spread


def test_greedy_takes_the_likeliest_token_whatever_the_padding(policy: Policy) -> None:
    together = sample(policy, PROMPTS, Decoding(6, temperature=0, batch_size=4))
    for prompt, response in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for token in response.ids:
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert float(logits.max() - logits[token]) < 1e-4
            ids.append(token)


def test_rows_go_on_alone_when_others_have_ended(policy: Policy) -> None:
    prompts = [[1, *range(5, 5 + n % 4), n] for n in range(10, 40)]
    responses = sample(policy, prompts, Decoding(3 * LEG, temperature=0, batch_size=30))
    for prompt, (ids, finished) in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        short = logits.max(dim=-1).values - logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert float(short.max()) < 1e-4
        assert EOS not in ids[:-1] and finished == (ids[-1] == EOS) and (finished or len(ids) == 3 * LEG)
    assert {(len(ids) - 1) // LEG for ids, _ in responses} == {0, 1, 2}


def test_the_end_is_forbidden_as_long_as_was_asked_for(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", list(range(0, 60, 2)))  # half of all tokens
    responses = sample(policy, [[1, 5]] * 30, Decoding(3 * LEG, min_new_tokens=LEG + 4, batch_size=30))
    lengths = {len(r.ids) for r in responses}
    assert min(lengths) == LEG + 5 and max(lengths) < 2 * LEG + 5


def test_a_response_ends_with_its_stop_token_and_says_so(policy: Policy) -> None:
    for response in sample(policy, [[1, 5]] * 50, Decoding(40, batch_size=25)):
        assert response.finished == (response.ids[-1] == EOS)
        assert EOS not in response.ids[:-1]
        assert response.finished or len(response.ids) == 40


@pytest.mark.parametrize("prompt", [[], [1] * 125])
def test_prompts_that_are_empty_or_too_long_are_named(policy: Policy, prompt: list[int]) -> None:
    with pytest.raises(DataError, match="prompt 1"):
        sample(policy, [[1, 5], prompt], Decoding(8))


def test_prompts_repeat_with_all_their_columns() -> None:
    asked = Prompts(["a", "b"], [[1], [2]], {"stratum": ["calm", "hostile"]}).repeat(2)
    assert asked == Prompts(["a", "a", "b", "b"], [[1], [1], [2], [2]], {"stratum": ["calm"] * 2 + ["hostile"] * 2})
