"""Peak resident memory of an evaluation against its number of prompts.

    OMP_NUM_THREADS=1 python benchmarks/evaluate_memory.py --prompts 250 1000 4000

A random Llama of about 100,000 weights answers each prompt 8 times with up to 32 tokens, scored by one cost and one
reward, every count of prompts in a process of its own. Printed are the peak (VmHWM), and how much of it came after the
model was loaded: while it sampled and scored, and in all.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES, TOKENS, VOCABULARY = 8, 32, 512


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def variety(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def write(folder: Path, prompts: int) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=128)).save_pretrained(folder / "model")
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "model")
    rows = ({"prompt": " ".join(f"w{3 + (i * k) % 500}" for k in (1, 3, 7, 11))} for i in range(prompts))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def peak() -> float:
    """MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def child(folder: Path, bootstrap: int) -> None:
    from stepwise import evaluations, measure
    from stepwise.display import Display
    from stepwise.policy import Policy

    here = Path(__file__).resolve()
    keys = [f"samples={SAMPLES}", f"max_new_tokens={TOKENS}", f"bootstrap={bootstrap}", "batch_size=256"]
    keys += [f"costs.length={here}:length", f"rewards.variety={here}:variety"]
    asked = evaluations.request(str(folder / "model"), [str(folder / "prompts.jsonl")], keys, output=folder / "out")
    Policy.load(str(folder / "model"), quantization="none")
    loaded, began = peak(), time.process_time()
    sampled: list[float] = []
    summarise = measure.summarise

    def noted(*arguments: Any, **options: Any) -> Any:
        sampled.extend((peak(), time.process_time()))
        return summarise(*arguments, **options)

    measure.summarise = noted
    evaluations.evaluate_on(asked, display=Display(quiet=True, results=False))
    seconds = [sampled[1] - began, time.process_time() - sampled[1]]
    print(json.dumps({"loaded": loaded, "sampled": sampled[0], "peak": peak(), "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.bootstrap)
        return
    print("prompts  responses  loaded MB  + sampling  + all  CPU s sampling, statistics")
    for prompts in given.prompts:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), prompts)
            command = [sys.executable, __file__, "--child", place, "--bootstrap", str(given.bootstrap)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rise = [row[key] - row["loaded"] for key in ("sampled", "peak")]
        seconds = "{:.0f}, {:.0f}".format(*row["seconds"])
        print(f"{prompts:7}  {prompts * SAMPLES:9}  {row['loaded']:9.0f}  {rise[0]:10.0f}  {rise[1]:5.0f}  {seconds}")


if __name__ == "__main__":
    main()
