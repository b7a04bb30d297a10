"""The DPO setting against TRL's DPOTrainer: the same model, pairs, LoRA and optimiser, side by side in one run.

    pip install -r benchmarks/requirements.txt        # into an environment of its own, after requirements.lock
    OMP_NUM_THREADS=1 python benchmarks/trl_parity.py --kind nf4 --repeats 7

dpo        stepwise, rsa_loss with alpha = 0 and Mean
rsa        stepwise, alpha = 0.5 and CVaR(0.97)
trl+gc     DPOTrainer as it comes, with gradient checkpointing
trl        the same without gradient checkpointing
trl-tuned  the same with what TRL only does on a GPU: prompt and padding do not pass through the head; and with tiles
           of 1,024 tokens x 2,048 entries, the fastest of five sizes on a CPU

The model of preference_step.py; 8 pairs of 127 to 256 tokens, half of them response. A step of TRL is what its own
`train` does between two callbacks. bitsandbytes' CPU re-packing, which loses LoRA gradients silently, is switched off
for TRL too. In the same precision both must find the same first loss: `--kind fp32` shows the difference. With nf4 TRL
holds its adapters in bfloat16, stepwise in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from preference_step import (
    BETA,
    LOADING,
    RANK,
    move_adapter,
    pairs,
    save_model,
    serve,
    show,
    status_mb,
    stepwise,
    take_turns,
)

VARIANTS = ["trl+gc", "trl", "trl-tuned", "dpo", "rsa"]
LENGTHS = [127, 145, 164, 182, 201, 219, 238, 256]


def trl_trainer(folder: Path, kind: str, *, checkpointing: bool, steps: int, output: str) -> Any:
    """TRL's trainer on the same weights, adapter and pairs."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    from stepwise.policy import cure_cpu_repacking

    quantization, dtype = LOADING[kind]
    options: dict[str, Any] = {"dtype": dtype}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    cure_cpu_repacking(model)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=output,
            beta=BETA,
            bf16=dtype == torch.bfloat16,
            gradient_checkpointing=checkpointing,
            per_device_train_batch_size=len(LENGTHS),
            max_steps=steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list([as_text(row) for row in pairs(LENGTHS)]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    move_adapter({name: p for name, p in trainer.model.named_parameters() if ".lora_" in name})
    return trainer


def tune_trl() -> None:
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True  # read there to decide whether to drop unlabelled positions
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = 2048
    trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE = 1024


def as_text(row: dict[str, Any]) -> dict[str, str]:
    """The words that the tokenizer reads as the ids of a pair; TRL appends EOS."""
    prompt = " ".join(f"w{i}" for i in row["prompt_ids"])
    chosen, rejected = ("".join(f" w{i}" for i in row[f"{side}_ids"][:-1]) for side in ("chosen", "rejected"))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def serve_trl(variant: str, kind: str, folder: Path, steps: int) -> None:
    """As `serve`, with the steps of TRL's own training loop."""
    from transformers import TrainerCallback

    class Turn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.before = status_mb("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sys.stdin.readline()
            self.start = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.process_time() - self.start

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                memory = status_mb("VmHWM") - self.before
                answer = {"seconds": self.seconds, "loss": float(logs["loss"]), "memory": memory}
                print(json.dumps(answer), flush=True)

    torch.set_num_threads(1)
    if variant == "trl-tuned":
        tune_trl()
    with tempfile.TemporaryDirectory() as output:
        trainer = trl_trainer(folder, kind, checkpointing=variant == "trl+gc", steps=steps, output=output)
        trainer.add_callback(Turn())
        trainer.train()


def child(variant: str, kind: str, folder: Path, steps: int) -> None:
    if variant.startswith("trl"):
        serve_trl(variant, kind, folder, steps)
    else:
        serve(lambda: stepwise(f"{variant}-{kind}", folder, LENGTHS))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=LOADING, default="nf4")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.variants[0], args.kind, Path(args.child), args.repeats + 1)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        flags = [f"--child={folder}", f"--kind={args.kind}", f"--repeats={args.repeats}", "--variants"]
        found = take_turns({name: [sys.executable, __file__, *flags, name] for name in args.variants}, args.repeats)
    print(f"{args.kind}, {len(LENGTHS)} pairs of {LENGTHS[0]} to {LENGTHS[-1]} tokens, {args.repeats} steps")
    show(found, [(own, other) for own in ("dpo", "rsa") for other in ("trl+gc", "trl", "trl-tuned")])


if __name__ == "__main__":
    main()
