"""Run recipes of benchmarks/option_bases.yaml on the CPU or on the second device; each into a folder of its own.

    python tests/device_runs.py second FOLDER nf4 bfloat16 rsa tail ...

Prints how each ended, and how many products of matrices the second device made for it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(device: str, folder: Path, quantization: str, dtype: str, bases: list[str]) -> None:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
    products: Counter[str] = Counter()
    if device == "second":
        import second_device

        second_device.move_in()
        products = second_device.calls
    from options import Bench

    bench = Bench(Path(tempfile.mkdtemp(dir=folder)))
    for base in bases:
        products.clear()
        left = bench.left_by(base, (f"model.quantization={quantization}", f"model.dtype={dtype}"))
        Path("runs").rename(folder / base)
        count = sum(products[name] for name in ("mm", "bmm", "addmm"))
        print(json.dumps({"base": base, "ends": left["ends"], "products": count}), flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_DEACTIVATE_ASYNC_LOAD": "1", "HF_HUB_OFFLINE": "1", "OPTION_KEY": "secret"}
    os.environ |= {"NO_PROXY": "127.0.0.1", "HF_HUB_CACHE": f"{sys.argv[2]}/models"}
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
