"""A pairwise judge behind HTTP, against a real server on this machine: both orders, verdicts, and what is none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from local_endpoint import Server, chat
from test_judge import KEY

from stepwise import endpoint, recipe_judges
from stepwise.errors import ConfigError, ScoreError
from stepwise.judge_targets import check, fingerprint, resolve
from stepwise.judging import Judged, judge_pairs

SAID = {"model": "m-1", "prompt": "Q: {prompt} A: {first} B: {second} Better?", "pattern": r"\[\[(.*?)\]\]"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    server.reply = longer
    yield server
    server.http.shutdown()
    server.http.server_close()


def asked_of(body: dict[str, Any]) -> tuple[str, str, str]:
    found = re.fullmatch(r"Q: (.*) A: (.*) B: (.*) Better\?", body["messages"][0]["content"])
    assert found is not None
    return found[1], found[2], found[3]


def longer(body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    _, first, second = asked_of(body)
    verdict = "tie" if len(first) == len(second) else "a" if len(first) > len(second) else "B"
    return 200, chat(f"I weighed both. [[{verdict}]] and not [[B]]"), {}


def judged(server: Server, first: list[str], second: list[str], **options: Any) -> Judged:
    spec = {"target": server.url, **SAID, "verdicts": {"A": 0.9, "B": 0.1, "tie": 0.5}, "timeout": 5, **options}
    judge = resolve(recipe_judges.parse(spec))
    return judge_pairs(judge, [f"p{i}" for i in range(len(first))], first, second, name="chat", asymmetry=1)


def test_every_pair_is_asked_in_both_orders_and_a_verdict_is_a_probability(server: Server) -> None:
    found = judged(server, ["xx", "x", "{second}"], ["y", "yy", "12345678"], api_key_env="JUDGE_KEY", max_tokens=9)
    assert found.wins == pytest.approx([0.9, 0.1, 0.5])
    assert found.asymmetry == 0
    orders = [("p0", "xx", "y"), ("p0", "y", "xx"), ("p1", "x", "yy"), ("p1", "yy", "x")]
    orders += [("p2", "{second}", "12345678"), ("p2", "12345678", "{second}")]  # a text is not filled in again
    assert sorted(map(asked_of, server.asked)) == sorted(orders)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.asked} == {("m-1", 0, 9)}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert server.paths == ["/v1/chat/completions"] * 6


def weighed(first: float, other: float) -> Any:
    """An answer whose third token is A, of probability `first`, where B has `other`."""
    tops = {" A": first, "b": other, " the": 1e-9}
    tokens = ["Better:", " ", " A", "."]
    said = [{"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": 0.0}]} for t in tokens]
    said[2]["top_logprobs"] = [{"token": t, "logprob": math.log(p)} for t, p in tops.items()]
    return {"choices": [{**chat("Better:  A.")["choices"][0], "logprobs": {"content": said}}]}


def test_a_soft_verdict_is_the_mean_over_the_tokens_that_could_stand_there(server: Server) -> None:
    server.reply = lambda body: (200, weighed(0.6, 0.2) if asked_of(body)[1] == "x" else weighed(0.1, 0.7), {})
    found = judged(server, ["x"], ["y"], soft=True, pattern=r": +(\w)", verdicts={"A": 1.0, "B": 0.0})
    assert found.wins == pytest.approx([(0.75 + 1 - 0.125) / 2])
    assert {(body["logprobs"], body["top_logprobs"]) for body in server.asked} == {(True, 20)}
    assert judged(server, ["x"], ["y"], pattern=r": +(\w)", verdicts={"A": 1.0, "B": 0.0}).wins == [0.5]
    assert "logprobs" not in server.asked[-1]


@pytest.mark.parametrize(
    ("reply", "told"),
    [(weighed(0.3, 0.1), "the verdicts have 40%"), (chat("Better: A"), "tells no probabilities of tokens")],
)
def test_without_probabilities_of_the_verdicts_none_is_soft(server: Server, reply: Any, told: str) -> None:
    server.reply = lambda _: (200, reply, {})
    with pytest.raises(ScoreError, match=told):
        judged(server, ["x"], ["y"], soft=True, pattern=r": +(\w)")


def test_a_favourite_position_drops_out_and_is_measured(server: Server) -> None:
    server.reply = lambda _: (200, chat("[[0.75]]"), {})  # the first one, whatever it is
    found = judged(server, ["x"], ["y"])
    assert found.wins == [0.5]
    assert found.asymmetry == pytest.approx(0.5)


def test_what_may_pass_is_tried_again_and_few_are_asked_at_once(server: Server) -> None:
    server.reply = lambda body: longer(body) if len(server.asked) > 2 else (503, b"busy", {})
    found = judged(server, ["xx"] * 12, ["y"] * 12, retries=3, concurrency=3)
    assert found.wins == pytest.approx([0.9] * 12)
    assert len(server.asked) == 26
    assert server.most_at_once <= 3


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("I cannot say", "does not match"),
        ("[[C]]", "finds, 'C', is no verdict (wanted: A, B, tie, a number in [0, 1])"),
        ("[[1.5]]", "is no verdict"),
        ("[[nan]]", "is no verdict"),
    ],
)
def test_an_answer_without_a_verdict_is_told_with_its_pair(server: Server, said: str, told: str) -> None:
    server.reply = lambda body: (200, chat(said), {}) if asked_of(body)[0] == "p1" else longer(body)
    with pytest.raises(ScoreError, match="prompt 'p1'") as caught:
        judged(server, ["x", "two", "x"], ["y", "y", "y"], api_key_env="JUDGE_KEY")
    assert told in str(caught.value) and "model 'm-1'" in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": "{first}"}, "would not see a response.*{second}"),
        ({"pattern": "A|B"}, "one group"),
        ({"verdicts": {"A": 2}}, "verdicts"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(options: dict[str, Any], told: str) -> None:
    spec = {"target": "https://host/v1", **SAID, **options}
    with pytest.raises(ConfigError, match=told):
        recipe_judges.parse({key: value for key, value in spec.items() if value is not None})
    with pytest.raises(ConfigError, match=r"this target needs options.*pattern"):
        recipe_judges.parse("https://host/v1")


def test_a_check_misses_the_key_and_another_question_is_another_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    spec = {"target": "https://host/v1", **SAID}
    with pytest.raises(ScoreError, match="JUDGE_KEY"):
        check(recipe_judges.parse({**spec, "api_key_env": "JUDGE_KEY"}))
    other = {**spec, "prompt": "Safer: {first} or {second}?"}
    assert fingerprint(recipe_judges.parse(spec)) != fingerprint(recipe_judges.parse(other))
