"""Token statistics against dense float64 differentiation, and what they promise about memory and exactness."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepwise.errors import ModelError
from stepwise.log_probs import log_probs
from stepwise.risk import CVaR, Entropic, EVaR, Mean, Mixture, RiskMeasure
from stepwise.token_stats import Head, TokenStats, token_stats

N, H, V = 9, 16, 1500  # V beyond the size up to which quantiles are sorted

MEASURES: list[tuple[RiskMeasure, str, float]] = [
    (Mean(), "mean", 0.0),
    (CVaR(1.0), "mean", 0.0),
    (CVaR(0.97), "cvar", 0.97),
    (CVaR(0.1), "cvar", 0.1),
    (Entropic(0.05), "entropic", 0.05),
    (Entropic(2.0), "entropic", 2.0),
]
each_measure = pytest.mark.parametrize(("measure", "name", "level"), MEASURES, ids=[repr(m[0]) for m in MEASURES])


def case(tokens: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy hidden (with gradient), reference hidden, weight, labels."""
    generator = torch.Generator().manual_seed(0)
    reference_NH = torch.randn(tokens, H, generator=generator)
    policy_NH = (reference_NH + 0.2 * torch.randn(tokens, H, generator=generator)).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator)
    return policy_NH, reference_NH, weight_VH, torch.randint(V, (tokens,), generator=generator)


def slope(stats: Any, policy_NH: Tensor) -> Tensor:
    """Gradient of a random combination of log_prob and risk with respect to the hidden states."""
    a_N, b_N = torch.randn(2, len(policy_NH), generator=torch.Generator().manual_seed(5))
    get = stats.__getitem__ if isinstance(stats, dict) else lambda key: getattr(stats, key)
    return torch.autograd.grad((a_N * get("log_prob") + b_N * get("risk")).sum(), policy_NH)[0]


def assert_matches(stats: TokenStats, expected: dict[str, Tensor], policy_NH: Tensor, tolerance: float = 2e-5) -> None:
    for key, value_N in expected.items():
        got_N = getattr(stats, key)
        assert got_N.dtype == torch.float32
        torch.testing.assert_close(got_N.double(), value_N, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(slope(stats, policy_NH), slope(expected, policy_NH), atol=tolerance, rtol=tolerance)


@each_measure
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_values_and_gradients_are_the_dense_ones(measure, name, level, chunk):
    policy_NH, reference_NH, weight_VH, labels_N = case()
    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=measure, chunk=chunk)
    expected = oracles.dense_token_stats(policy_NH, reference_NH, weight_VH, labels_N, name, level)
    assert_matches(stats, expected, policy_NH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probs_alone_have_the_same_bits_and_so_has_their_gradient(dtype, softcap, monkeypatch):
    """Two chunks, the second of several blocks; PPO sets the one against the other."""
    monkeypatch.setattr("stepwise.token_stats.CHUNK_ELEMENTS", {"cpu": 16 * V})
    monkeypatch.setattr("stepwise.token_stats.BLOCK_ELEMENTS", 3 * V)
    policy_NH, reference_NH, weight_VH, labels_N = case(tokens=27)
    own_NH = policy_NH.detach().to(dtype).requires_grad_()
    head = Head(weight_VH.to(dtype), bias=torch.linspace(-1, 1, V), softcap=softcap)
    both_N = token_stats(own_NH, reference_NH.to(dtype), head, labels_N, risk=CVaR(0.9)).log_prob
    alone_N, pull_N = log_probs(own_NH, head, labels_N), torch.linspace(-1, 1, 27)
    assert torch.equal(alone_N, both_N)
    (one_NH,), (two_NH,) = (torch.autograd.grad((pull_N * x_N).sum(), own_NH) for x_N in (alone_N, both_N))
    assert torch.equal(one_NH, two_NH) and one_NH.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(log_probs(own_NH, head, labels_N), both_N)


@each_measure
def test_gradients_with_respect_to_the_logits_are_onehot_minus_pi_and_pi_minus_tilt(measure, name, level):
    """With an identity head the hidden states are the logits; q* comes from the definition."""
    generator = torch.Generator().manual_seed(1)
    z_NV = torch.randn(N, 40, generator=generator, requires_grad=True)
    log_ref_NV = torch.log_softmax(torch.randn(N, 40, generator=generator), -1)
    labels_N = torch.randint(40, (N,), generator=generator)
    stats = token_stats(z_NV, log_ref_NV, Head(torch.eye(40)), labels_N, risk=measure)
    pi_NV = torch.softmax(z_NV.detach().double(), -1)
    x_NV = (log_ref_NV.double() - pi_NV.log()).requires_grad_()
    p_NV = log_ref_NV.double().exp()
    values = [oracles.dense_risk(name, level, x, p) for x, p in zip(x_NV, p_NV, strict=True)]
    (tilt_NV,) = torch.autograd.grad(torch.stack(values).sum(), x_NV)
    onehot_NV = nn.functional.one_hot(labels_N, 40)
    for value_N, expected_NV in ((stats.log_prob, onehot_NV - pi_NV), (stats.risk, pi_NV - tilt_NV)):
        (got_NV,) = torch.autograd.grad(value_N.sum(), z_NV, retain_graph=True)
        torch.testing.assert_close(got_NV.double(), expected_NV, atol=1e-6, rtol=0)


@pytest.mark.parametrize("measure", [EVaR(0.9), Mixture([(0.5, Mean()), (0.5, CVaR(0.1))])], ids=repr)
def test_any_risk_measure_works(measure):
    policy_NH, reference_NH, weight_VH, labels_N = case()
    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=measure)
    log_pi_NV = torch.log_softmax(policy_NH.double() @ weight_VH.double().T, -1)
    log_ref_NV = torch.log_softmax(reference_NH.double() @ weight_VH.double().T, -1)
    risk_N = measure(log_ref_NV - log_pi_NV, log_ref_NV)
    torch.testing.assert_close(stats.risk.double(), risk_N, atol=2e-5, rtol=1e-5)
    (got_NH,) = torch.autograd.grad(stats.risk.sum(), policy_NH)
    (expected_NH,) = torch.autograd.grad(risk_N.sum(), policy_NH)
    torch.testing.assert_close(got_NH, expected_NH, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["log_prob", "risk"])
def test_one_output_alone_gives_its_own_gradient(part):
    policy_NH, reference_NH, weight_VH, labels_N = case()
    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9))
    expected = oracles.dense_token_stats(policy_NH, reference_NH, weight_VH, labels_N, "cvar", 0.9)
    (got_NH,) = torch.autograd.grad(getattr(stats, part).sum(), policy_NH)
    (expected_NH,) = torch.autograd.grad(expected[part].sum(), policy_NH)
    torch.testing.assert_close(got_NH, expected_NH, atol=2e-5, rtol=1e-5)


# --- exactness at the start of a stage --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("vocab", [V, V - 3])
@pytest.mark.parametrize("measure", [Mean(), CVaR(0.97), Entropic(1.0), EVaR(0.9)], ids=repr)
def test_equal_hidden_states_have_exactly_no_risk_and_no_log_ratio(dtype, chunk, vocab, measure):
    policy_NH, _, weight_VH, labels_N = case()
    policy_NH = policy_NH.detach().to(dtype).requires_grad_()
    reference_NH = policy_NH.detach().t().contiguous().t()  # the same numbers in another memory order
    head = Head(weight_VH.to(dtype), vocab=vocab)
    stats = token_stats(policy_NH, reference_NH, head, labels_N.clamp(max=vocab - 1), risk=measure, chunk=chunk)
    assert torch.equal(stats.log_prob, stats.ref_log_prob)
    assert stats.risk.abs().max().item() == 0.0
    assert stats.kl.abs().max().item() == 0.0
    (grad_NH,) = torch.autograd.grad(stats.risk.sum(), policy_NH)
    assert grad_NH.abs().max().item() < 1e-5


@pytest.mark.parametrize("measure", [CVaR(0.97), CVaR(0.1), Entropic(1.0), EVaR(0.5)], ids=repr)
def test_risk_is_at_least_kl_and_kl_at_least_zero(measure):
    policy_NH, reference_NH, weight_VH, labels_N = case()
    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=measure)
    assert bool((stats.risk > stats.kl).all())
    assert bool((stats.kl > 0).all())


# --- what the head can be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["scale", "softcap", "bias", "all"])
def test_scale_softcap_and_bias_are_differentiated_through(shape):
    policy_NH, reference_NH, weight_VH, labels_N = case()
    scale = 0.5 if shape in ("scale", "all") else 1.0
    softcap = 3.0 if shape in ("softcap", "all") else None
    bias_V = torch.randn(V, generator=torch.Generator().manual_seed(7)) if shape in ("bias", "all") else None

    def log_probs(hidden_NH: Tensor) -> Tensor:
        z_NV = hidden_NH.double() @ weight_VH.double().T
        z_NV = scale * (z_NV if bias_V is None else z_NV + bias_V.double())
        return torch.log_softmax(z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap), -1)

    head = Head(weight_VH, bias_V, scale=scale, softcap=softcap)
    stats = token_stats(policy_NH, reference_NH, head, labels_N, risk=CVaR(0.9), chunk=4)
    dense = oracles.dense_stats_of_log_probs(log_probs(policy_NH), log_probs(reference_NH), labels_N, "cvar", 0.9)
    assert_matches(stats, dense, policy_NH)
    plain = oracles.dense_token_stats(policy_NH, reference_NH, weight_VH, labels_N, "cvar", 0.9)
    assert (stats.risk - plain["risk"]).abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["vocab", "vocab and bias", "bias"])
def test_padded_entries_have_probability_zero(padding):
    policy_NH, reference_NH, weight_VH, labels_N = case()
    padded_VH = torch.cat([weight_VH, 5 * torch.ones(36, H)])
    head = Head(padded_VH, vocab=V)
    if padding == "vocab and bias":
        head = Head(padded_VH, torch.zeros(V + 36), vocab=V)
    if padding == "bias":
        head = Head(padded_VH, torch.cat([torch.zeros(V), torch.full((36,), -math.inf)]))
    stats = token_stats(policy_NH, reference_NH, head, labels_N, risk=CVaR(0.9))
    expected = oracles.dense_token_stats(policy_NH, reference_NH, weight_VH, labels_N, "cvar", 0.9)
    assert_matches(stats, expected, policy_NH)


def test_a_linear_layer_tied_or_not_is_a_head():
    policy_NH, reference_NH, weight_VH, labels_N = case()
    expected = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9))
    embedding = nn.Embedding.from_pretrained(weight_VH, freeze=True)
    tied = nn.Linear(H, V, bias=False)
    tied.weight = embedding.weight
    got = token_stats(policy_NH, reference_NH, tied, labels_N, risk=CVaR(0.9))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    biased = nn.Linear(H, V).requires_grad_(False)
    got = token_stats(policy_NH, reference_NH, biased, labels_N, risk=CVaR(0.9))
    dense_N = torch.log_softmax(biased(reference_NH), -1)[range(N), labels_N]
    torch.testing.assert_close(got.ref_log_prob, dense_N, atol=2e-6, rtol=1e-5)


def test_bfloat16_is_close_to_the_float64_of_the_same_numbers():
    policy_NH, reference_NH, weight_VH, labels_N = case()
    policy_NH = policy_NH.detach().bfloat16().requires_grad_()
    reference_NH, weight_VH = reference_NH.bfloat16(), weight_VH.bfloat16()
    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9))
    expected = oracles.dense_token_stats(policy_NH, reference_NH, weight_VH, labels_N, "cvar", 0.9)
    for key, value_N in expected.items():
        torch.testing.assert_close(getattr(stats, key).double(), value_N, atol=5e-2, rtol=2e-2)
    got_NH, expected_NH = slope(stats, policy_NH), slope(expected, policy_NH)
    assert got_NH.dtype == torch.bfloat16
    assert (got_NH - expected_NH).norm() < 2e-2 * expected_NH.norm()


def test_autocast_does_not_change_the_numbers():
    policy_NH, reference_NH, weight_VH, labels_N = case()
    plain = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


# --- what carries a gradient, and how much is stored ------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_only_log_prob_and_risk_carry_a_gradient_and_only_to_the_policy():
    policy_NH, reference_NH, weight_VH, labels_N = case()
    reference_NH.requires_grad_()
    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9))
    assert [value_N.requires_grad for value_N in stats] == [True, False, True, False]
    (stats.log_prob + stats.risk).sum().backward()
    assert policy_NH.grad is not None
    assert reference_NH.grad is None


def test_forward_and_backward_never_make_a_tensor_of_tokens_by_vocabulary():
    tokens, chunk = 300, 5
    policy_NH, reference_NH, weight_VH, labels_N = case(tokens)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9), chunk=chunk)
        (stats.log_prob + stats.risk).sum().backward()
    # A view of the weight is among the tensors seen; nothing else is larger than the logits of a chunk.
    assert largest.elements == max(chunk * V, weight_VH.numel()) < tokens * V / 10
    assert max(saved) == 2 * tokens * H


def test_without_gradient_the_values_are_the_same_and_nothing_is_multiplied_back():
    policy_NH, reference_NH, weight_VH, labels_N = case()
    trained = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9))
    with torch.no_grad(), torch.profiler.profile() as profile:
        scored = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(0.9), chunk=N)
    assert all(torch.equal(a, b) for a, b in zip(trained, scored, strict=True))
    assert not scored.risk.requires_grad
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == 2


# --- edges ------------------------------------------------------------------------------------------------------------


def test_no_tokens_are_four_empty_results_with_a_gradient_of_zeros():
    policy_NH, reference_NH, weight_VH, labels_N = case()
    policy_0H = policy_NH.detach()[:0].requires_grad_()
    stats = token_stats(policy_0H, reference_NH[:0], Head(weight_VH), labels_N[:0], risk=CVaR(0.9))
    assert [tuple(value.shape) for value in stats] == [(0,)] * 4
    (stats.log_prob.sum() + stats.risk.sum()).backward()
    assert policy_0H.grad.shape == (0, H)


def test_a_logit_gap_of_120_gives_numbers():
    """exp(-120) is zero in float32: log(softmax) would be -inf and 0 * -inf a NaN."""
    policy_NH = torch.tensor([[120.0, 0.0, -1.0], [0.0, 120.0, -1.0], [0.0, 1.0, -1.0]], requires_grad=True)
    reference_NH = torch.tensor([[0.0, 120.0, 0.0], [0.0, 0.0, 0.0], [120.0, 0.0, 0.0]])
    labels_N = torch.tensor([1, 1, 2])
    for measure, name, level in MEASURES:
        stats = token_stats(policy_NH, reference_NH, Head(torch.eye(3)), labels_N, risk=measure)
        expected = oracles.dense_token_stats(policy_NH, reference_NH, torch.eye(3), labels_N, name, level)
        assert_matches(stats, expected, policy_NH)


def test_what_does_not_fit_is_refused():
    policy_NH, reference_NH, weight_VH, labels_N = case()

    def call(**changed: Any) -> TokenStats:
        given = {"policy": policy_NH, "reference": reference_NH, "head": Head(weight_VH), "labels": labels_N, **changed}
        chunk = given.get("chunk")
        return token_stats(
            given["policy"], given["reference"], given["head"], given["labels"], risk=CVaR(0.9), chunk=chunk
        )

    ignored_N = labels_N.clone()
    ignored_N[2] = -100
    wrong = [
        ({"labels": ignored_N}, r"-100 to \d+.*drop prompt and padding"),
        ({"labels": torch.full((N,), V)}, "labels out of range"),
        ({"labels": labels_N.float()}, "float32 labels"),
        ({"labels": labels_N[1:]}, "do not fit"),
        ({"reference": reference_NH[1:]}, "do not fit"),
        ({"policy": policy_NH[None], "reference": reference_NH[None]}, "do not fit"),
        ({"reference": reference_NH.bfloat16()}, "one dtype"),
        ({"head": Head(weight_VH[:, 1:])}, "hidden size 15"),
        ({"head": Head(torch.zeros(V * H // 2, 1, dtype=torch.uint8))}, "not quantised"),
        ({"head": nn.Linear(H, V)}, "freeze"),
        ({"chunk": 0}, "at least one token"),
    ]
    for changed, message in wrong:
        with pytest.raises(ModelError, match=message):
            call(**changed)
    with torch.no_grad():
        assert call(head=nn.Linear(H, V)).risk.shape == (N,)
