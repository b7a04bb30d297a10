"""Episodes of a random policy against float64 log-probabilities and naive loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import dense_policy
import pytest
import torch
from small_models import llama, save
from torch import Tensor

from stepwise import episodes
from stepwise.episodes import Episodes, advantages, play, rank, returns, summary, training_rows
from stepwise.errors import InVain, ScoreError
from stepwise.methods.policy_gradient import Ppo, batches
from stepwise.policy import Policy
from stepwise.sampling import Decoding, Prompts
from stepwise.scored_policy import ScoredPolicy
from stepwise.tokens import Tokens
from stepwise.vigil import Vigil, failure_signs

RANK, ALPHA = 4, 8.0
PROMPTS = Prompts(["a", "b", "c"], [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]], {"stratum": [0, 1, 2]})
TAIL = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that tells responses apart."""
    return [len(ids) / 4 + s for ids, s in zip(columns["completion_ids"], columns["stratum"], strict=True)]


def odd(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A cost that tells them apart otherwise."""
    return [float(sum(ids) % 7) for ids in columns["completion_ids"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def scored(base: Path) -> ScoredPolicy:
    """Two adapters with an effect and a head with one."""
    policy = Policy.load(str(base), quantization="none", dtype=torch.float32)
    torch.manual_seed(3)
    for name in ("below", "top"):
        policy.push(name, rank=RANK, alpha=ALPHA)
        with torch.no_grad():
            for parameter in policy.top_parameters().values():
                parameter.normal_(std=0.1)
    found = ScoredPolicy(policy, outputs=2)
    torch.nn.init.normal_(found.head.weight, std=0.3)
    return found


@pytest.fixture(scope="module")
def played(scored: ScoredPolicy) -> Episodes:
    scorers = {"length": length, "odd": odd}
    return play(scored, PROMPTS, Decoding(9, batch_size=4, seed=2), scorers=scorers, samples=2)


def rows_of(played: Episodes, weight: Tensor, *, whitening: Any) -> Tokens:
    advantage, target = advantages(played, beta=0.3, lam=0.95)
    return training_rows(played, weight, advantage[..., 0], target, whitening=whitening)


def hidden_values(scored: ScoredPolicy, prompt: list[int], response: list[int]) -> Tensor:
    """w . h before every response token, from the model as transformers runs it."""
    with torch.no_grad():
        output = scored.policy.model(torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    return (output.hidden_states[-1][0] @ scored.head.weight.T)[len(prompt) - 1 : -1]


def test_log_probabilities_values_and_kl_are_those_of_the_dense_model(
    base: Path, scored: ScoredPolicy, played: Episodes
) -> None:
    adapters, scale = dense_policy.adapters_of(scored.policy), ALPHA / RANK
    lengths = [len(ids) for ids in played.responses]
    assert len(set(lengths)) > 1 and played.log_prob_BT.shape == (6, max(lengths))
    for b, (prompt, ids) in enumerate(zip(played.prompts, played.responses, strict=True)):
        label = torch.tensor(ids)[:, None]
        own, ref = (
            dense_policy.response_log_probs(base, stack, prompt, ids, scale=scale).detach()
            for stack in (adapters, adapters[:1])
        )
        kl = (own.exp() * (own - ref)).sum(-1)
        expected = [own.gather(-1, label)[:, 0], ref.gather(-1, label)[:, 0], hidden_values(scored, prompt, ids), kl]
        found = [played.log_prob_BT, played.ref_log_prob_BT, played.value_BTK, played.kl_BT]
        for wanted, got in zip(expected, found, strict=True):
            torch.testing.assert_close(got[b, : len(ids)].double(), wanted.double(), atol=2e-5, rtol=1e-4)
            assert not got[b, len(ids) :].any()
    assert played.score_BK[:, 1].tolist() == [sum(ids) % 7 for ids in played.responses]
    assert played.score_B.tolist() == [n / 4 + b // 2 for b, n in enumerate(lengths)]
    assert played.seconds.keys() == {"sample", "score", "measure"}


def naive(played: Episodes, b: int, *, beta: float, lam: float, k: int = 0) -> tuple[list[float], list[float]]:
    """Advantages and returns of one episode by critic k, one token after another from the end."""
    n = len(played.responses[b])
    ratio = (played.log_prob_BT - played.ref_log_prob_BT)[b, :n].tolist()
    value = [*played.value_BTK[b, :n, k].tolist(), 0.0]
    advantage = [0.0] * (n + 1)
    for t in reversed(range(n)):
        reward = -beta * ratio[t] + (float(played.score_BK[b, k]) if t == n - 1 else 0.0)
        advantage[t] = reward + value[t + 1] - value[t] + lam * advantage[t + 1]
    return advantage[:n], [a + v for a, v in zip(advantage[:n], value, strict=False)]


def test_episodes_are_ranked_by_the_return_that_is_asked_for(played: Episodes) -> None:
    ratio = [
        sum((played.log_prob_BT - played.ref_log_prob_BT)[b, : len(ids)].tolist())
        for b, ids in enumerate(played.responses)
    ]
    mc = [float(s) - 0.5 * r for s, r in zip(played.score_B, ratio, strict=True)]
    assert rank(played, by="mc_kl", beta=0.5, lam=0.9).tolist() == pytest.approx(mc, abs=1e-5)
    assert rank(played, by="score", beta=0.5, lam=0.9).tolist() == played.score_B.tolist()
    first = [naive(played, b, beta=0.5, lam=0.9)[1][0] for b in range(6)]
    assert rank(played, by="lambda_return", beta=0.5, lam=0.9).tolist() == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("whitening", ["kept", "batch", "none"])
def test_rows_hold_the_kept_episodes_and_their_whitened_advantages(played: Episodes, whitening: Any) -> None:
    rows = rows_of(played, TAIL, whitening=whitening)
    kept = [0, 2, 3, 5]
    assert rows.index == kept and rows.numbers["weight"] == [1.0] * 4
    assert rows.field("response_ids") == [played.responses[b] for b in kept]
    over = kept if whitening == "kept" else range(6)
    pool = [a for b in over for a in naive(played, b, beta=0.3, lam=0.95)[0]]
    mean = sum(pool) / len(pool)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in pool) / (len(pool) - 1))
    for row, b in zip(rows, kept, strict=True):
        advantage, returns = naive(played, b, beta=0.3, lam=0.95)
        if whitening != "none":
            advantage = [(a - mean) / deviation for a in advantage]
        assert row["advantage"] == pytest.approx(advantage, abs=1e-4)
        assert row["returns.0"] == pytest.approx(returns, abs=1e-5)
        assert row["value.1"] == played.value_BTK[b, : len(returns), 1].tolist()
        assert row["log_prob"] == played.log_prob_BT[b, : len(returns)].tolist()


def test_weights_have_a_mean_of_one_over_tokens(played: Episodes) -> None:
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 1.0])
    rows = rows_of(played, weight, whitening="kept")
    lengths = [len(row["response_ids"]) for row in rows]
    assert sum(w * n for w, n in zip(rows.numbers["weight"], lengths, strict=True)) == pytest.approx(sum(lengths))
    ratios = [w / float(weight[b]) for w, b in zip(rows.numbers["weight"], rows.index, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_the_objective_is_its_definition_token_by_token(scored: ScoredPolicy, played: Episodes) -> None:
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 1.0])
    shifted = replace(played, log_prob_BT=played.log_prob_BT + 0.3, value_BTK=played.value_BTK - 0.4)
    rows = list(rows_of(shifted, weight, whitening="kept"))
    total = 0.0
    for row in rows:
        b = row["index"]
        for t in range(len(row["response_ids"])):
            new = float(played.log_prob_BT[b, t])
            ratio, a = math.exp(new - row["log_prob"][t]), row["advantage"][t]
            policy = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
            critics = 0.0
            for k in (0, 1):
                value, old, target = float(played.value_BTK[b, t, k]), row[f"value.{k}"][t], row[f"returns.{k}"][t]
                near = min(max(value, old - 0.2), old + 0.2)
                critics += 0.5 * max((value - target) ** 2, (near - target) ** 2)
            total += row["weight"] * (policy + 0.1 * critics)
    objective = Ppo(scored, clip=0.2, clip_value=0.2, value_weight=0.1)

    def loss(some: list[dict[str, Any]]) -> Tensor:
        batch = batches(scored.policy.pad_id)(some)
        assert batch["items"].item() == sum(len(row["response_ids"]) for row in some)
        outcome = objective(**{k: v for k, v in batch.items() if k not in ("items", "rows")})
        return outcome.loss

    found = loss(rows)
    assert found.item() == pytest.approx(total, rel=1e-4)
    assert loss(rows[:2][::-1]).item() + loss(rows[2:]).item() == pytest.approx(found.item(), rel=1e-5)
    found.backward()
    assert scored.head.weight.grad is not None and bool(scored.head.weight.grad.any())
    trained = scored.policy.top_parameters().values()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    scored.head.weight.grad = None
    for p in trained:
        p.grad = None


def test_the_summary_weighs_what_is_kept(played: Episodes) -> None:
    returns = torch.tensor([1.0, 5.0, 2.0, 3.0, 6.0, 4.0])
    found = summary(played, returns, TAIL)
    ratio = [sum((played.log_prob_BT - played.ref_log_prob_BT)[b].tolist()) for b in range(6)]
    assert found["returns/mean"] == 3.5 and found["returns/kept"] == 2.5 and found["returns/threshold"] == 4.0
    assert found["kl/kept"] == pytest.approx(sum(ratio[b] for b in (0, 2, 3, 5)) / 4, abs=1e-5)
    assert found["kl/sampled"] == pytest.approx(sum(ratio) / 6, abs=1e-5)
    assert found["kl/exact"] == pytest.approx(float(played.kl_BT.sum()) / 6, abs=1e-5)
    assert found["episodes/kept"] == 4 and found["episodes/effective"] == pytest.approx(4.0)
    uneven = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert summary(played, returns, uneven)["episodes/effective"] == pytest.approx(16 / 10)


def test_signs_of_failure_are_told(played: Episodes) -> None:
    returns = torch.arange(6.0)
    far = replace(played, log_prob_BT=played.ref_log_prob_BT.clone())
    assert failure_signs(far, returns, target_kl=6.0) == []
    flat = replace(far, score_BK=torch.ones(6, 2))
    assert "all rewards are 1" in failure_signs(flat, returns, target_kl=6.0)[0]
    assert "the 6 episodes that are compared all return 0" in failure_signs(far, torch.zeros(6), target_kl=6.0)[0]
    assert failure_signs(far, torch.zeros(1), target_kl=6.0) == []  # a tail of one is told apart by its tokens
    drifted = replace(far, log_prob_BT=played.ref_log_prob_BT + 50)
    assert "runs away" in failure_signs(drifted, returns, target_kl=6.0)[0]
    stuck = replace(far, responses=[[7] * len(ids) for ids in played.responses])
    assert all(len(ids) >= 4 for ids in played.responses)
    assert "repeat one token" in failure_signs(stuck, returns, target_kl=6.0)[0]
    short = replace(far, responses=[[2]] * 6, log_prob_BT=torch.zeros(6, 1), ref_log_prob_BT=torch.zeros(6, 1))
    assert "empty" in failure_signs(short, returns, target_kl=6.0)[0]


def test_rows_on_disk_are_the_rows(played: Episodes, tmp_path: Path) -> None:
    rows = rows_of(played, TAIL, whitening="kept")
    episodes.write(rows, {"numbers": {"beta": 0.3}}, tmp_path)
    again, about = episodes.read(tmp_path)
    assert list(again) == list(rows) and about == {"numbers": {"beta": 0.3}}


def test_an_episode_without_a_reward_stops_the_iteration(scored: ScoredPolicy) -> None:
    with pytest.raises(ScoreError, match="episode 1"):
        play(
            scored,
            PROMPTS,
            Decoding(3),
            scorers={"partial": lambda prompts, completions, **columns: [1.0, None, 2.0]},
        )


def test_every_cost_has_its_critic_and_the_kl_is_a_price_on_both_sides(played: Episodes) -> None:
    advantage, target = advantages(played, beta=0.5, lam=0.9)
    for b, ids in enumerate(played.responses):
        expected = naive(played, b, beta=-0.5, lam=0.9, k=1)
        assert advantage[b, : len(ids), 1].tolist() == pytest.approx(expected[0], abs=1e-5)
        assert target[b, : len(ids), 1].tolist() == pytest.approx(expected[1], abs=1e-5)
    ratio = (played.log_prob_BT - played.ref_log_prob_BT).sum(-1)
    found = returns(played, beta=0.5)
    torch.testing.assert_close(found, played.score_BK + torch.stack([-0.5 * ratio, 0.5 * ratio], -1))


def test_leave_one_out_takes_the_other_samples_of_the_prompt_as_baseline(played: Episodes) -> None:
    advantage, _ = advantages(played, beta=0.5, lam=None, samples=2)
    return_BK = returns(played, beta=0.5).double().tolist()
    for b, ids in enumerate(played.responses):
        other = b + 1 if b % 2 == 0 else b - 1
        for k in (0, 1):
            expected = [return_BK[b][k] - return_BK[other][k]] * len(ids)
            assert advantage[b, : len(ids), k].tolist() == pytest.approx(expected, abs=1e-5)
        assert not advantage[b, len(ids) :].any()


def test_training_in_vain_is_stopped_after_some_iterations_in_a_row(played: Episodes) -> None:
    far, returns = replace(played, log_prob_BT=played.ref_log_prob_BT.clone()), torch.arange(6.0)
    flat = replace(far, score_BK=torch.ones(6, 2))
    vigil = Vigil(target_kl=6.0, patience=2)
    for one, failing in ((flat, 1), (far, 0), (flat, 1)):
        vigil.look(one, returns)
        vigil.check(where="here")
        assert vigil.failing == failing
    again = Vigil(target_kl=6.0, patience=2)
    again.load_state_dict(vigil.state_dict())
    again.look(flat, returns)
    with pytest.raises(InVain, match=r"2 iterations in a row.*all rewards are 1"):
        again.check(where="here")
    assert Vigil(target_kl=6.0, patience=None).look(flat, returns)
    short = replace(far, responses=[[7, 2]] * 6, log_prob_BT=torch.zeros(6, 2), ref_log_prob_BT=torch.zeros(6, 2))
    assert "2 tokens on average, 21 in the first" in failure_signs(short, returns, target_kl=6.0, first_length=21)[0]
