"""The tail browser in a real browser: sort, filter, compare, keys, many rows, text that would like to be code."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import POLICIES, cost, make

from stepwise.report.page import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver, as Debian has them")

MANY = 10_000
NEEDLE = 7_777
EVIL = "</script><script>window.ran=1</script><img src=x onerror='window.ran=2'><b>bold</b>"


def say(policy: str, prompt: int) -> str:
    return EVIL if prompt == 3 else f"{policy} says {prompt}" + (" needle" if prompt == NEEDLE else "")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report([make(folder / "run", prompts=MANY, say=say)], folder / "report.html")


@pytest.fixture
def page(driver: Any, report: Path) -> Any:
    """The page, opened anew and ready."""
    driver.get(report.as_uri())
    wait(driver, "!document.getElementById('browser').hidden && document.querySelector('.entry')")
    return driver


def wait(page: Any, condition: str) -> None:
    for _ in range(600):
        if page.execute_script(f"return Boolean({condition})"):
            return
        time.sleep(0.05)
    raise AssertionError(f"never became true: {condition}")


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def every(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements("css selector", selector))


def rows(page: Any) -> list[str]:
    """The prompts of the rows in the document, from the top."""
    script = """return [...document.querySelectorAll('.entry')].sort((a, b) => a.dataset.place - b.dataset.place)
        .map(row => row.querySelector('[role=rowheader] .said').textContent)"""
    return list(page.execute_script(script))


def ranked(policy: str, *, falling: bool = True) -> list[str]:
    sign = -1 if falling else 1
    order = sorted(range(MANY), key=lambda i: (sign * cost(policy, i), i))
    return [f"question {i}" for i in order]


def choose(page: Any, name: str, text: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(one(page, f"#{name}")).select_by_visible_text(text)


def test_the_worst_responses_come_first_and_a_click_sorts_by_another_policy(page: Any) -> None:
    assert rows(page)[:5] == ranked("safe")[:5]
    one(page, "#heads button[data-by='1']").click()
    assert rows(page)[:5] == ranked("helpful")[:5]
    one(page, "#heads button[data-by='1']").click()
    assert rows(page)[:5] == ranked("helpful", falling=False)[:5]
    assert one(page, "#heads button[data-by='1']").get_attribute("aria-sort") == "ascending"


def test_answers_to_one_prompt_stand_next_to_each_other(page: Any) -> None:
    first = int(rows(page)[0].split()[1])
    cells = [cell.text for cell in every(page, "#entry-0 [role=gridcell]")]
    assert len(cells) == 3
    for policy, cell in zip(POLICIES, cells, strict=True):
        assert f"{policy} says {first}" in cell
    one(page, "#policies input[value='0']").click()
    assert len(every(page, "#entry-0 [role=gridcell]")) == 2


def test_filters_by_text_stratum_and_cost(page: Any) -> None:
    one(page, "#text").send_keys("needle")
    assert one(page, "#count").text == "1 of 10,000" and rows(page) == [f"question {NEEDLE}"]
    assert [mark.text for mark in every(page, ".entry mark")] == ["needle"] * 3
    one(page, "#reset").click()
    choose(page, "stratum", "hostile")
    assert one(page, "#count").text == f"{sum(i % 3 == 2 for i in range(MANY)):,} of 10,000"
    one(page, "#from").send_keys("49")
    kept = [i for i in range(MANY) if i % 3 == 2 and cost("safe", i) >= 49]
    assert one(page, "#count").text == f"{len(kept):,} of 10,000"
    worst = sorted(kept, key=lambda i: (-cost("safe", i), i))
    assert rows(page)[:5] == [f"question {i}" for i in worst[:5]]


def test_sorts_by_what_one_policy_does_worse_than_another(page: Any) -> None:
    choose(page, "by", "helpful")
    choose(page, "minus", "safe")
    gap = sorted(range(MANY), key=lambda i: (cost("safe", i) - cost("helpful", i), i))
    assert rows(page)[:5] == [f"question {i}" for i in gap[:5]]


def test_only_rows_in_sight_are_in_the_document(page: Any) -> None:
    for share in (0, 0.3, 0.99, 1):
        page.execute_script(
            "const l = document.getElementById('list'); l.scrollTop = arguments[0] * l.scrollHeight", share
        )
        wait(page, f"Math.abs(document.querySelector('.entry').dataset.place / {MANY} - {share}) < 0.02")
        assert 0 < len(every(page, ".entry")) < 40
    assert ranked("safe")[-1] in rows(page)


def test_text_of_a_response_does_not_run(page: Any) -> None:
    choose(page, "measure", "place of the prompt")
    assert "question 3" in rows(page)
    cell = one(page, "#entry-3 [role=gridcell] .said")
    assert cell.text == EVIL
    one(page, "#entry-3").click()
    assert one(page, "#detail-answers pre").text == EVIL
    assert page.execute_script("return window.ran === undefined && !document.querySelector('#tail img, #tail .said b')")
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_everything_works_with_the_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    listed = one(page, "#list")
    listed.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert one(page, ".entry[aria-selected='true']").get_attribute("id") == "entry-2"
    listed.send_keys(Keys.ENTER)
    assert one(page, "#detail-place").text == "3 of 10000"
    one(page, "#detail").send_keys(Keys.ARROW_RIGHT)
    assert one(page, "#detail-prompt").text == ranked("safe")[3]
    one(page, "#detail").send_keys(Keys.ESCAPE)
    wait(page, "!document.getElementById('detail').open && document.activeElement.id === 'list'")
    listed.send_keys(Keys.END)
    wait(page, f"document.getElementById('entry-{MANY - 1}')")
    listed.send_keys("2")
    assert rows(page)[:3] == ranked("helpful")[:3]
    listed.send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "text"


def test_light_dark_print_and_a_picture_of_each(page: Any, tmp_path: Path, record_property: Any) -> None:
    grounds = []
    for theme in ("light", "dark"):
        one(page, "#theme").click()
        assert one(page, "#theme").text == theme
        grounds.append(page.execute_script("return getComputedStyle(document.documentElement).backgroundColor"))
        page.execute_script("document.getElementById('tail').scrollIntoView()")
        assert page.save_screenshot(str(tmp_path / f"{theme}.png"))
    assert grounds[0] != grounds[1]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not one(page, "#browser").is_displayed()
    printed = one(page, ".worst").text
    assert ranked("safe")[0] in printed and ranked("helpful")[0] in printed
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    paint = page.execute_script("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    script = """const text = document.getElementById('text'), start = performance.now();
        text.value = 'needle'; text.dispatchEvent(new Event('input')); return performance.now() - start"""
    print(f"first paint {paint} ms, filter of {MANY} x 3 responses {page.execute_script(script)} ms")
    record_property("first_paint_ms", paint)
