"""Time and memory of the per-token statistics, forward and backward, side by side in one run.

    OMP_NUM_THREADS=1 python benchmarks/token_stats.py --tokens 4096 --vocab 32000 --repeats 5

dense         full logits, torch autograd, CVaR by a full sort
checkpointed  the same, a chunk of tokens at a time under torch.utils.checkpoint
stepwise      stepwise.token_stats
trl           TRL's chunked log-probability and KL kernels, without risk and without the reference's log-probability
              (only where `trl` can be imported)

Seconds are CPU seconds (`process_time`, one thread), the median of the repeats; memory is the peak above the inputs.
Every variant runs in a process of its own. Ratios are to the first variant. The head is frozen, everything is float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ALPHA = 0.97
SPREAD = 3.0  # standard deviation of the logits; the most likely of 32,000 tokens then has a probability of about 0.05


def inputs(tokens: int, vocab: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocab, hidden, generator=generator) * SPREAD / hidden**0.5
    reference_NH = torch.randn(tokens, hidden, generator=generator)
    policy_NH = reference_NH + 0.1 * torch.randn(tokens, hidden, generator=generator)
    return policy_NH.requires_grad_(), reference_NH, weight_VH, torch.randint(vocab, (tokens,), generator=generator)


def dense(policy_NH: Tensor, reference_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    log_pi_NV = torch.log_softmax(policy_NH @ weight_VH.T, -1)
    with torch.no_grad():
        log_ref_NV = torch.log_softmax(reference_NH @ weight_VH.T, -1)
        p_NV = log_ref_NV.exp()
    x_NV = log_ref_NV - log_pi_NV
    with torch.no_grad():
        order_NV = x_NV.argsort(-1, descending=True)
        sorted_p_NV = p_NV.gather(-1, order_NV)
        before_NV = sorted_p_NV.cumsum(-1) - sorted_p_NV
        taken_NV = torch.minimum(sorted_p_NV, (ALPHA - before_NV).clamp_(min=0)).div_(ALPHA)
        q_NV = torch.zeros_like(p_NV).scatter_(-1, order_NV, taken_NV)
        kl_N = (p_NV * x_NV).sum(-1)
    label_N1 = labels_N.unsqueeze(-1)
    ratio_N = log_pi_NV.gather(-1, label_N1) - log_ref_NV.gather(-1, label_N1)
    return torch.stack([ratio_N.squeeze(-1), (q_NV * x_NV).sum(-1), kl_N])


def run_dense(*given: Tensor) -> None:
    dense(*given)[:2].sum().backward()


def run_checkpointed(policy_NH: Tensor, reference_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> None:
    parts = [
        checkpoint(dense, policy_CH, reference_CH, weight_VH, labels_C, use_reentrant=False)
        for policy_CH, reference_CH, labels_C in zip(
            policy_NH.split(128), reference_NH.split(128), labels_N.split(128), strict=True
        )
    ]
    torch.cat(parts, 1)[:2].sum().backward()


def run_stepwise(policy_NH: Tensor, reference_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> None:
    from stepwise.risk import CVaR
    from stepwise.token_stats import Head, token_stats

    stats = token_stats(policy_NH, reference_NH, Head(weight_VH), labels_N, risk=CVaR(ALPHA))
    ((stats.log_prob - stats.ref_log_prob).sum() + stats.risk.sum()).backward()


def run_trl(policy_NH: Tensor, reference_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> None:
    from trl.kernels import chunked_divergence, chunked_logprob

    # Tiles of 1,024 x 2,048 were its fastest of five on a CPU; its own, made for a GPU, take twice the time.
    chunked_divergence.TOKEN_CHUNK_SIZE = chunked_logprob.TOKEN_CHUNK_SIZE = 1024
    chunked_divergence.VOCAB_CHUNK_SIZE = 2048
    log_prob_N, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
        policy_NH, weight_VH, None, labels_N, 1.0, 2048, None, 1.0, ()
    )
    divergence = chunked_divergence.ChunkedDivergenceFunction
    kl_N, _ = divergence.apply(policy_NH, weight_VH, None, reference_NH, weight_VH, None, 0.0)
    (log_prob_N.sum() + kl_N.sum()).backward()


VARIANTS: dict[str, Callable[..., None]] = {
    "dense": run_dense,
    "checkpointed": run_checkpointed,
    "stepwise": run_stepwise,
    "trl": run_trl,
}


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def measure(variant: str, tokens: int, vocab: int, hidden: int, repeats: int) -> None:
    """Print one JSON object: seconds of every repeat and the peak above the inputs in MB."""
    torch.set_num_threads(1)
    run = VARIANTS[variant]
    run(*inputs(32, 2048, hidden))  # libraries and their buffers are loaded before anything is counted
    given = inputs(tokens, vocab, hidden)
    seconds, before = [], status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(repeats):
        given[0].grad = None
        start = time.process_time()
        run(*given)
        seconds.append(time.process_time() - start)
    print(json.dumps({"seconds": seconds, "memory": status_mb("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = args.tokens, args.vocab, args.hidden, args.repeats
    if args.child:
        measure(args.variants[0], *size)
        return
    print(f"{args.tokens:,} tokens x {args.vocab:,} entries, H = {args.hidden}, CVaR({ALPHA}), {args.repeats} repeats")
    print(f"{'variant':<14}{'CPU s':>8}{'min':>8}{'ratio':>8}{'peak MB':>10}{'ratio':>8}")
    first = None
    for variant in args.variants:
        if variant == "trl" and importlib.util.find_spec("trl") is None:
            continue
        flags = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocab", "hidden", "repeats")]
        command = [sys.executable, __file__, "--child", *flags, "--variants", variant]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        seconds, memory = statistics.median(found["seconds"]), found["memory"]
        first = first or (seconds, memory)
        print(
            f"{variant:<14}{seconds:>8.2f}{min(found['seconds']):>8.2f}{seconds / first[0]:>8.2f}"
            f"{memory:>10.0f}{memory / first[1]:>8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
