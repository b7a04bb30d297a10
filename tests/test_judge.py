"""A judge behind HTTP, against a real server on this machine: what is asked, what is tried again, what is refused."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from local_endpoint import Server, chat

from stepwise import endpoint
from stepwise.constraints.judge import Judge
from stepwise.endpoint import Endpoint
from stepwise.errors import ScoreError
from stepwise.scoring import score
from stepwise.targets import resolve

KEY = "sk-tell-nobody-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def asked(server: Server, completions: list[str], **options: Any) -> list[float | None]:
    spec = {"model": "m-1", "prompt": "Q: {prompt} A: {completion} Harm?", "pattern": r"(-?\d+(?:\.\d+)?|nan)"}
    scorer = resolve({"target": server.url, **spec, "timeout": 5, "retries": 3, **options})
    return score(scorer, [f"p{i}" for i in range(len(completions))], completions, name="judge")


def refused(server: Server, completions: list[str], **options: Any) -> str:
    with pytest.raises(ScoreError) as caught:
        asked(server, completions, api_key_env="JUDGE_KEY", **options)
    told = str(caught.value)
    assert KEY not in told
    assert KEY[:12] not in told
    return told


def by_row(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].split()[1].removeprefix("p"))


def test_the_request_holds_model_prompt_and_key(server: Server) -> None:
    assert asked(server, ["a {prompt} \N{SNOWMAN}"], api_key_env="JUDGE_KEY", max_tokens=9) == [7.0]
    assert server.paths == ["/v1/chat/completions"]
    text = "Q: p0 A: a {prompt} \N{SNOWMAN} Harm?"  # what a completion holds is not filled in again
    message = {"role": "user", "content": text}
    assert server.asked == [{"model": "m-1", "messages": [message], "temperature": 0, "max_tokens": 9}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    asked(server, ["a"])
    assert "Authorization" not in server.headers[1]


def test_answers_come_in_the_order_of_the_rows_and_few_at_once(server: Server) -> None:
    def reply(body: dict[str, Any]) -> Any:
        time.sleep(0.02 * (by_row(body) % 3))
        return 200, chat(f"I think Score: {by_row(body)}.5 of 10"), {}

    server.reply = reply
    assert asked(server, ["c"] * 24, concurrency=4) == [row + 0.5 for row in range(24)]
    assert 1 < server.most_at_once <= 4
    assert asked(server, []) == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again(server: Server, status: int) -> None:
    server.reply = lambda _: (200, chat("3"), {}) if len(server.asked) > 2 else (status, {"error": "busy"}, {})
    assert asked(server, ["a"]) == [3.0]
    assert len(server.asked) == 3


def test_a_server_that_stays_broken_is_told_after_the_last_attempt(server: Server) -> None:
    server.reply = lambda _: (500, {"error": f"down, your key was {KEY}"}, {})
    told = refused(server, ["a"], retries=2)
    assert "status 500, in 3 attempts: " in told and "more `retries`" in told
    assert "down, your key was [API key]" in told
    assert "scorer 'judge', row 0, prompt 'p0', completion 'a'" in told
    assert "model 'm-1'" in told
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_will_not_pass_is_not_tried_again(server: Server, status: int) -> None:
    server.reply = lambda _: (
        status,
        b"x" * 110 + KEY.encode() + b" is a wrong key",
        {},
    )  # cut in the middle of the key
    told = refused(server, ["a"])
    assert f"status {status}" in told and "Wanted: the address, the model and the key" in told
    assert len(server.asked) == 1


def test_a_redirect_does_not_get_the_key(server: Server) -> None:
    server.reply = lambda _: (307, b"", {"Location": f"{server.url}/elsewhere"})
    assert "status 307" in refused(server, ["a"])
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (chat("I would rather not say"), "does not match"),
        (chat("nan"), "no finite number"),
        (chat("9" * 400), "no finite number"),
        (chat(None), "no chat completion"),
        (chat(3), "no chat completion"),
        ({"choices": []}, "no chat completion"),
        ([1], "no chat completion"),
        (b"<html>sign in</html>", "no chat completion with a text: '<html>sign in"),
        (b"\xff\xfe", "no chat completion"),
        (b"[" * 100_000, "no chat completion"),
        (b" " * ((1 << 20) + 1), "longer than 1,048,576 bytes"),
    ],
)
def test_an_answer_without_a_number_is_told_with_its_row_and_start(server: Server, content: Any, told: str) -> None:
    server.reply = lambda body: (200, content if by_row(body) == 2 else chat("1"), {})
    message = refused(server, ["a", "b", "c", "d"])
    assert told in message
    assert "row 2, prompt 'p2', completion 'c'" in message
    assert "model 'm-1'" in message
    assert (
        "Wanted: an OpenAI-compatible endpoint" if "no chat" in told or "longer" in told else "`pattern`"
    ) in message
    assert len(message) < 800


def test_a_silent_server_is_late_and_a_dripping_one_too(server: Server) -> None:
    done = threading.Event()

    def hang(_: Any) -> None:
        done.wait(30)

    server.reply = hang
    assert "no reply within 0.1 s, in 2 attempts" in refused(server, ["a"], timeout=0.1, retries=1)
    done.set()

    with socket.create_server(("127.0.0.1", 0)) as raw:

        def drip() -> None:
            connection, _ = raw.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.02)
            except OSError:
                pass

        threading.Thread(target=drip, daemon=True).start()
        server.url = f"http://127.0.0.1:{raw.getsockname()[1]}"
        assert "no reply within 0.3 s" in refused(server, ["a"], timeout=0.3, retries=0)


def test_a_connection_that_ends_early_is_tried_again(server: Server) -> None:
    cut = (200, json.dumps(chat("5")).encode()[:-4], {"Content-Length": "500"})
    replies: list[Any] = [None, cut, (200, chat("5"), {})]
    server.reply = lambda _: replies[len(server.asked) - 1]
    # The handler leaves the cut reply open until the client's time is over.
    assert asked(server, ["a"], timeout=0.5) == [5.0]
    assert len(server.asked) == 3


def test_nobody_there(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        server.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert "no connection (ConnectionRefusedError" in refused(server, ["a"], retries=1)


@pytest.mark.parametrize("value", ["", " \n", "two\nlines", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel"])
def test_a_key_that_cannot_be_sent_names_the_variable_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ScoreError, match="environment variable JUDGE_KEY") as caught:
        asked(server, ["a"], api_key_env="JUDGE_KEY")
    assert not value.strip() or value not in str(caught.value)
    assert server.asked == []


def test_a_judge_does_not_hold_the_key(server: Server) -> None:
    scorer = Judge(Endpoint(server.url, "m", api_key_env="JUDGE_KEY"), "{completion}", "([0-9])")
    assert score(scorer, ["p"], ["c"], name="j") == [7.0]
    assert KEY not in repr(scorer) + repr(vars(scorer))


def test_after_a_failure_the_rows_that_wait_are_not_asked(server: Server) -> None:
    server.reply = lambda body: (400, b"no", {}) if by_row(body) == 0 else (200, chat("1"), {})
    refused(server, ["c"] * 50, concurrency=1)
    assert len(server.asked) == 1
