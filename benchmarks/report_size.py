"""A report over many responses: how long it takes to write, how large it is, how soon a browser shows and filters it.

    OMP_NUM_THREADS=1 python benchmarks/report_size.py --prompts 10000 --words 40

Four policies answer every prompt with random words (English has fewer surprises and packs better). Paint and filter are
those of headless Chromium, as Debian has it with its driver; without it they are left out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import report_runs

from stepwise.report.page import write_report

POLICIES = ("base", "helpful", "safe", "selected")
FILTER = """const text = document.getElementById('text'), start = performance.now();
    text.value = arguments[0]; text.dispatchEvent(new Event('input')); return performance.now() - start"""
PAINT = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def run_of(folder: Path, prompts: int, words: int) -> Path:
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnoprstuvwyz", k=draw.randint(2, 9))) for _ in range(8000)]

    def say(policy: str, prompt: int) -> str:
        return " ".join(draw.choices(vocabulary, k=words))

    report_runs.POLICIES = POLICIES
    report_runs.cost = lambda policy, prompt: draw.random() * 20
    return report_runs.make(folder, prompts=prompts, say=say, ask=lambda i: say("", i)[:80])


def browse(page: Path, repeats: int) -> dict[str, float]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(flag)
    browser: Any = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    paints, filters = [], []
    for _ in range(repeats):
        browser.get(page.as_uri())
        while not browser.execute_script("return Boolean(document.querySelector('.entry'))"):
            time.sleep(0.05)
        paints.append(browser.execute_script(PAINT))
        filters += [browser.execute_script(FILTER, word) for word in ("ab", "zz", "")]
    rows = browser.execute_script("return document.querySelectorAll('.entry').length")
    browser.quit()
    medians = {"first paint, ms": statistics.median(paints), "filter, ms": statistics.median(filters)}
    return medians | {"slowest filter, ms": max(filters), "rows in the page": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(Path(folder) / "run", args.prompts, args.words)
        started = time.process_time()
        page = write_report([run], Path(folder) / "report.html")
        found = {"written in, CPU s": time.process_time() - started, "size, MB": page.stat().st_size / 1e6}
        if shutil.which("chromium") and shutil.which("chromedriver"):
            found |= browse(page, args.repeats)
    print(f"{args.prompts} prompts x {len(POLICIES)} policies, {args.words} words each")
    for name, value in found.items():
        print(f"{name:<22}{value:>10.1f}")


if __name__ == "__main__":
    main()
