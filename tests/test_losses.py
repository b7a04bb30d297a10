"""Preference losses: closed forms, gradients, reductions, and the theory behind them on small trees (float64)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepwise.losses import PairSums, ipo_loss, rsa1_loss, rsa_loss
from stepwise.risk import CVaR, Entropic, Mean, RiskMeasure
from stepwise.token_stats import Head, token_stats

VOCABULARY, DEPTH = 4, 3


def sums(log_ratio: list[float], risk: list[float]) -> PairSums:
    return PairSums(
        torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True),
        torch.tensor(risk, dtype=torch.float64, requires_grad=True),
    )


def minus_log_sigmoid(z: np.ndarray | float) -> np.ndarray:
    return np.logaddexp(0.0, -np.asarray(z, np.float64))


numbers = st.lists(st.floats(-50, 50), min_size=3, max_size=3)


# --- closed forms and reductions --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(m_w=numbers, m_l=numbers, d_w=numbers, d_l=numbers, beta=st.floats(0.01, 2), alpha=st.floats(0, 2))
def test_losses_are_their_equations(m_w, m_l, d_w, d_l, beta, alpha):
    chosen, rejected = sums(m_w, d_w), sums(m_l, d_l)
    margin, drift = np.subtract(m_w, m_l), np.subtract(d_l, d_w)
    for got, expected in (
        (rsa_loss(chosen, rejected, beta=beta, alpha=alpha), minus_log_sigmoid(beta * (margin - alpha * drift))),
        (rsa1_loss(chosen, rejected, beta=beta), minus_log_sigmoid(beta * (margin - drift))),
        (ipo_loss(chosen, rejected, beta=beta), (margin - 1 / (2 * beta)) ** 2),
    ):
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_alpha_zero_is_dpo_exactly_whatever_the_risk():
    chosen, rejected = sums([1.0, -2.0], [3.0, 5.0]), sums([0.5, 4.0], [7.0, 0.1])
    calm = [PairSums(side.log_ratio, torch.zeros_like(side.risk)) for side in (chosen, rejected)]
    loss_B = rsa_loss(chosen, rejected, beta=0.1, alpha=0.0)
    assert torch.equal(loss_B, rsa_loss(*calm, beta=0.1, alpha=0.7))
    # DPO, written with its own symbols: -log sigmoid(beta log pi_w/ref_w - beta log pi_l/ref_l)
    expected = [math.log1p(math.exp(-(0.1 * 1.0 - 0.1 * 0.5))), math.log1p(math.exp(-(0.1 * -2.0 - 0.1 * 4.0)))]
    np.testing.assert_allclose(loss_B.detach().numpy(), expected, rtol=1e-14)


def test_the_chosen_risk_moves_the_value_but_only_variant_1_sends_it_a_gradient():
    chosen, rejected = sums([1.0], [3.0]), sums([0.5], [2.0])
    higher = PairSums(chosen.log_ratio, chosen.risk + 1)
    assert rsa_loss(higher, rejected, beta=0.5, alpha=0.5) < rsa_loss(chosen, rejected, beta=0.5, alpha=0.5)
    inputs = (chosen.log_ratio, chosen.risk, rejected.log_ratio, rejected.risk)
    grads = torch.autograd.grad(
        rsa_loss(chosen, rejected, beta=0.5, alpha=0.5).sum(), inputs, allow_unused=True, materialize_grads=True
    )
    z = (1.0 - 0.5) - 0.5 * (2.0 - 3.0)
    c = -0.5 / (1 + math.exp(0.5 * z))
    assert [grad.item() for grad in grads] == pytest.approx([c, 0.0, -c, -0.5 * c])
    grads = torch.autograd.grad(rsa1_loss(chosen, rejected, beta=0.5).sum(), inputs)
    z = (1.0 - 0.5) - (2.0 - 3.0)
    c = -0.5 / (1 + math.exp(0.5 * z))
    assert [grad.item() for grad in grads] == pytest.approx([c, c, -c, -c])


def test_extreme_margins_are_finite_with_a_bounded_gradient():
    chosen, rejected = sums([1e6, -1e6], [0.0, 0.0]), sums([-1e6, 1e6], [1e6, 1e6])
    for loss_B in (
        rsa_loss(chosen, rejected, beta=1.0, alpha=0.5),
        rsa1_loss(chosen, rejected, beta=1.0),
        ipo_loss(chosen, rejected, beta=1.0),
    ):
        grads = torch.autograd.grad(loss_B.sum(), (chosen.log_ratio, rejected.log_ratio))
        assert bool(loss_B.isfinite().all() and all(grad.isfinite().all() for grad in grads))


def test_ipo_is_smallest_at_a_margin_of_one_over_two_beta():
    margins = torch.linspace(0, 10, 101, dtype=torch.float64)
    zeros = torch.zeros_like(margins)
    loss_B = ipo_loss(PairSums(margins, zeros), PairSums(zeros, zeros), beta=0.1)
    assert margins[loss_B.argmin()].item() == pytest.approx(5.0)


# --- one position: gradients and reductions through the risk ----------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "name", "level"),
    [(Mean(), "mean", 0.0), (CVaR(0.9), "cvar", 0.9), (CVaR(0.3), "cvar", 0.3), (Entropic(2.0), "entropic", 2.0)],
    ids=repr,
)
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_gradient_of_the_whole_loss_with_respect_to_the_logits(measure, name, level, alpha):
    """c = -beta sigmoid(-beta z);  variant 1 +-c (e_y - q*);  2 c (e_y - pi), -c (e_y - (1 - alpha) pi - alpha q*)."""
    beta, chosen_label, rejected_label = 0.7, 2, 5
    z_2V, ref_z_2V = torch.randn(2, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_2V.requires_grad_()
    log_pi_2V, log_ref_2V = torch.log_softmax(z_2V, -1), torch.log_softmax(ref_z_2V, -1)
    ratio_2V = log_pi_2V - log_ref_2V
    risk_2 = measure(-ratio_2V, log_ref_2V)
    chosen = PairSums(ratio_2V[:1, chosen_label], risk_2[:1])
    rejected = PairSums(ratio_2V[1:, rejected_label], risk_2[1:])
    if alpha is None:
        loss = rsa1_loss(chosen, rejected, beta=beta)
    else:
        loss = rsa_loss(chosen, rejected, beta=beta, alpha=alpha)
    (got_2V,) = torch.autograd.grad(loss.sum(), z_2V)

    x_2V, pi_2V = -ratio_2V.detach().requires_grad_(), log_pi_2V.detach().exp()
    d_2 = torch.stack([oracles.dense_risk(name, level, x, p.exp()) for x, p in zip(x_2V, log_ref_2V, strict=True)])
    (q_2V,) = torch.autograd.grad(d_2.sum(), x_2V)
    onehot_2V = torch.nn.functional.one_hot(torch.tensor([chosen_label, rejected_label]), 8)
    weight = 1.0 if alpha is None else alpha
    margin = (ratio_2V[0, chosen_label] - ratio_2V[1, rejected_label]).item()
    c = -beta / (1 + math.exp(beta * (margin - weight * (d_2[1] - d_2[0]).item())))
    chosen_V = onehot_2V[0] - (q_2V[0] if alpha is None else pi_2V[0])
    rejected_V = onehot_2V[1] - (1 - weight) * pi_2V[1] - weight * q_2V[1]
    torch.testing.assert_close(got_2V, torch.stack([c * chosen_V, -c * rejected_V]), atol=1e-14, rtol=1e-12)


def test_a_tail_of_everything_is_tdpo_exactly():
    """RSA with CVaR(1.0) against TDPO1 and TDPO2 written with the sequential KL."""
    generator = torch.Generator().manual_seed(0)
    z_PNV, ref_z_PNV = torch.randn(2, 2, 6, 50, dtype=torch.float64, generator=generator)
    labels_PN = torch.randint(50, (2, 6), generator=generator)
    log_pi_PNV, log_ref_PNV = torch.log_softmax(z_PNV, -1), torch.log_softmax(ref_z_PNV, -1)
    m_P = (log_pi_PNV - log_ref_PNV).gather(-1, labels_PN[..., None])[..., 0].sum(-1)
    d_P = CVaR(1.0)(log_ref_PNV - log_pi_PNV, log_ref_PNV).sum(-1)
    kl_P = (log_ref_PNV.exp() * (log_ref_PNV - log_pi_PNV)).sum((-1, -2)).tolist()
    chosen, rejected = (PairSums(m_P[i : i + 1], d_P[i : i + 1]) for i in (0, 1))
    margin, drift = (m_P[0] - m_P[1]).item(), kl_P[1] - kl_P[0]
    expected = float(minus_log_sigmoid(0.1 * (margin - drift)))
    assert rsa1_loss(chosen, rejected, beta=0.1).item() == pytest.approx(expected, rel=1e-13)
    expected = float(minus_log_sigmoid(0.1 * (margin - 0.5 * drift)))
    assert rsa_loss(chosen, rejected, beta=0.1, alpha=0.5).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_chunked_sequence_sums_give_the_loss_and_gradient_of_the_dense_computation(chunk):
    lengths, hidden, vocabulary = [5, 1, 9, 3], 12, 1300
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    reference_NH = torch.randn(tokens, hidden, generator=generator)
    policy_NH = (reference_NH + 0.3 * torch.randn(tokens, hidden, generator=generator)).requires_grad_()
    weight_VH = torch.randn(vocabulary, hidden, generator=generator)
    labels_N = torch.randint(vocabulary, (tokens,), generator=generator)
    sequence_N = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))

    def loss_and_gradient(log_prob_N: Tensor, ref_log_prob_N: Tensor, risk_N: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(4, dtype=log_prob_N.dtype)
        m_B, d_B = (total.index_add(0, sequence_N, v_N) for v_N in (log_prob_N - ref_log_prob_N, risk_N))
        chosen, rejected = PairSums(m_B[:2], d_B[:2]), PairSums(m_B[2:], d_B[2:])
        loss = rsa_loss(chosen, rejected, beta=0.1, alpha=0.5).mean()
        return loss.detach(), torch.autograd.grad(loss, policy_NH)[0]

    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.97), chunk=chunk)
    got = loss_and_gradient(stats.log_prob, stats.ref_log_prob, stats.risk)
    dense = oracles.dense_token_stats(policy_NH, reference_NH, weight_VH, labels_N, "cvar", 0.97)
    expected = loss_and_gradient(dense["log_prob"], dense["ref_log_prob"], dense["risk"])
    torch.testing.assert_close(got[0].double(), expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(got[1], expected[1], atol=1e-6, rtol=0)


# --- the theory: token trees ------------------------------------------------------------------------------------------


class Tree:
    """All replies of DEPTH tokens: a reference at every state, a utility at every leaf, and the optimal policy.

    Q is built from the leaves with the lower-tail CVaR of the next Q under the reference; the step optimum is
    pi*(z|s) ~ ref(z|s) exp(Q(s, z) / b).
    """

    def __init__(
        self,
        utility: dict[tuple[int, ...], float],
        reference: dict[tuple[int, ...], np.ndarray],
        b: float,
        level: float,
    ):
        self.reference, self.b, self.level = reference, b, level
        self.q: dict[tuple[int, ...], np.ndarray] = {}
        for depth in reversed(range(DEPTH)):
            for state in itertools.product(range(VOCABULARY), repeat=depth):
                children = [(*state, z) for z in range(VOCABULARY)]
                last = depth == DEPTH - 1
                self.q[state] = np.array([utility[child] if last else self.value(child) for child in children])
        tilted = {s: reference[s] * np.exp(q / b) for s, q in self.q.items()}
        self.optimum = {s: weight / weight.sum() for s, weight in tilted.items()}

    def value(self, state: tuple[int, ...]) -> float:
        """V(s): the lower tail of Q, which is minus the upper tail of -Q."""
        return -oracles.cvar(-self.q[state], self.reference[state], self.level)

    def advantages(self, reply: tuple[int, ...]) -> float:
        return sum(self.q[reply[:t]][reply[t]] - self.value(reply[:t]) for t in range(DEPTH))

    def sums(self, measure: RiskMeasure, log_pi: dict[tuple[int, ...], Tensor] | None = None) -> PairSums:
        """m and D of every reply, in the order of itertools.product."""
        log_ref = {s: torch.from_numpy(p).log() for s, p in self.reference.items()}
        log_pi = log_pi or {s: torch.from_numpy(p).log() for s, p in self.optimum.items()}
        risk = {s: measure(log_ref[s] - log_pi[s], log_ref[s]) for s in log_ref}
        m = [sum((log_pi[y[:t]] - log_ref[y[:t]])[y[t]] for t in range(DEPTH)) for y in REPLIES]
        d = [sum(risk[y[:t]] for t in range(DEPTH)) for y in REPLIES]
        return PairSums(torch.stack(m), torch.stack(d))


REPLIES = list(itertools.product(range(VOCABULARY), repeat=DEPTH))


def random_tree(seed: int, b: float = 0.5, level: float = 0.4) -> tuple[Tree, np.ndarray]:
    rng = np.random.default_rng(seed)
    utility_Y = 2 * rng.normal(size=len(REPLIES))
    states = [s for depth in range(DEPTH) for s in itertools.product(range(VOCABULARY), repeat=depth)]
    reference = {s: rng.dirichlet(np.ones(VOCABULARY)) for s in states}
    return Tree(dict(zip(REPLIES, utility_Y, strict=True)), reference, b, level), utility_Y


def pairs_of(values: PairSums, chosen: Tensor, rejected: Tensor) -> tuple[PairSums, PairSums]:
    return PairSums(*(v[chosen] for v in values)), PairSums(*(v[rejected] for v in values))


def test_advantages_telescope_to_the_utility():
    tree, utility_Y = random_tree(0)
    gap_Y = np.array([tree.advantages(y) for y in REPLIES]) - utility_Y
    np.testing.assert_allclose(gap_Y, -tree.value(()), atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_the_margin_of_the_optimal_policy_is_the_difference_of_utilities(seed):
    """b [(m1 + D1) - (m2 + D2)] = U1 - U2 with the CVaR of the utility, and not with the sequential KL."""
    tree, utility_Y = random_tree(seed)
    values = tree.sums(CVaR(tree.level))
    implied_Y = tree.b * (values.log_ratio + values.risk).numpy()
    np.testing.assert_allclose(implied_Y - implied_Y[0], utility_Y - utility_Y[0], atol=1e-12)
    neutral = tree.sums(Mean())
    implied_Y = tree.b * (neutral.log_ratio + neutral.risk).numpy()
    assert np.abs(implied_Y - implied_Y[0] - (utility_Y - utility_Y[0])).max() > 0.1
    first, second = torch.arange(1, 64), torch.zeros(63, dtype=torch.long)
    loss_B = rsa1_loss(*pairs_of(values, first, second), beta=tree.b)
    np.testing.assert_allclose(loss_B.numpy(), minus_log_sigmoid(utility_Y[1:] - utility_Y[0]), atol=1e-12)


def test_the_optimal_policy_makes_the_expected_loss_stationary():
    """Preferences by Bradley-Terry on U: the gradient of E[loss] over all pairs vanishes at pi*, and not next to it."""
    tree, utility_Y = random_tree(1)
    first, second = torch.triu_indices(64, 64, offset=1)
    preferred = torch.sigmoid(torch.from_numpy(utility_Y)[first] - torch.from_numpy(utility_Y)[second])

    def gradient(measure: RiskMeasure, nudge: float = 0.0) -> float:
        z = {s: torch.from_numpy(p).log().requires_grad_() for s, p in tree.optimum.items()}
        log_pi = {s: torch.log_softmax(v + nudge * torch.arange(VOCABULARY), -1) for s, v in z.items()}
        values = tree.sums(measure, log_pi)
        forth = rsa1_loss(*pairs_of(values, first, second), beta=tree.b)
        back = rsa1_loss(*pairs_of(values, second, first), beta=tree.b)
        grads = torch.autograd.grad((preferred * forth + (1 - preferred) * back).mean(), list(z.values()))
        return max(grad.abs().max().item() for grad in grads)

    assert gradient(CVaR(tree.level)) < 1e-14
    assert gradient(CVaR(tree.level), nudge=0.1) > 1e-4
    assert gradient(Mean()) > 1e-4


def test_two_stages_reach_the_joint_optimum():
    """With b1 = (1 + lam) beta and b2 = b1 / lam, stage 2 (reference = stage 1) is stationary at the joint optimum.

    max E[R - lam C] - (1 + lam) beta KL(p || ref)  has the solution  ref exp((R - lam C) / ((1 + lam) beta)) / Z.
    """
    rng = np.random.default_rng(0)
    size, beta, lam = 6, 0.2, 1.5
    reward, cost = torch.from_numpy(rng.normal(size=(2, size)))
    reference = torch.from_numpy(rng.dirichlet(np.ones(size))).log()
    joint = torch.log_softmax(reference + (reward - lam * cost) / ((1 + lam) * beta), 0)
    first, second = torch.triu_indices(size, size, offset=1)

    def gradient(log_policy: Tensor, log_ref: Tensor, utility: Tensor, b: float) -> float:
        z = log_policy.clone().requires_grad_()
        ratio = torch.log_softmax(z, 0) - log_ref
        values = PairSums(ratio, torch.zeros_like(ratio))
        preferred = torch.sigmoid(utility[first] - utility[second])
        forth = rsa_loss(*pairs_of(values, first, second), beta=b, alpha=0.0)
        back = rsa_loss(*pairs_of(values, second, first), beta=b, alpha=0.0)
        return torch.autograd.grad((preferred * forth + (1 - preferred) * back).mean(), z)[0].abs().max().item()

    b1 = (1 + lam) * beta
    stage_1 = torch.log_softmax(reference + reward / b1, 0)
    assert gradient(stage_1, reference, reward, b1) < 1e-15
    assert gradient(joint, stage_1, -cost, b1 / lam) < 1e-15
    assert gradient(joint, stage_1, -cost, b1) > 1e-3
    assert gradient(joint, stage_1, cost, b1 / lam) > 1e-3
