"""Asking a language model behind an OpenAI-compatible endpoint, many questions at once."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from stepwise.errors import ScoreError
from stepwise.scoring import BadRow

FIRST_WAIT, LONGEST_WAIT = 0.25, 60.0  # seconds before a further attempt; doubled from attempt to attempt
MAX_REPLY = 1 << 20  # bytes of a reply
_SHOWN = 120  # characters of an answer in an error

_ANSWERING = "an endpoint that answers; a larger `timeout`, more `retries` or a smaller `concurrency` may help"
_KNOWN = "the address, the model and the key (`api_key_env`) that the endpoint knows"
_COMPATIBLE = "an OpenAI-compatible endpoint, its address without /chat/completions"
_MATCHING = "a prompt that asks for such an answer, a `pattern` that finds it, or a larger `max_tokens`"

T = TypeVar("T")


class Answer(NamedTuple):
    """What a model said. tokens: every token of it, and what could have stood there, by probability; where they were
    asked for."""

    text: str
    tokens: Sequence[tuple[str, dict[str, float]]] = ()


class Unreadable(Exception):
    """Why an answer is not what was asked for."""


@dataclass(frozen=True)
class Endpoint:
    """A model, and how it is asked.

    A request is POST {url}/chat/completions with one user message and temperature 0. Status 408, 429 and 5xx, timeouts
    and lost connections are tried again; other statuses, redirects and answers that cannot be read are errors of that
    row. The API key is read from the environment when a request is made, and kept nowhere.
    """

    url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 5
    concurrency: int = 8
    max_tokens: int = 256
    alternatives: int = 0  # tokens that could have stood in the place of each one, the most probable ones

    def __post_init__(self) -> None:
        _key(self.api_key_env)  # to be told now, not hours later

    def ask(self, questions: Sequence[str], read: Callable[[Answer], T]) -> list[T]:
        """What `read` makes of the answer to each question; after a failure no further question is asked.

        Raises `BadRow` where there is no answer, or `read` raises `Unreadable`; else what `read` raises.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "stepwise"}
        secret = _key(self.api_key_env)
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        todo, found = deque(range(len(questions))), dict[int, T]()
        failures: list[Exception] = []
        stop = threading.Event()

        def work() -> None:
            while todo and not stop.is_set():
                try:
                    row = todo.popleft()
                    body = json.dumps(self._body(questions[row])).encode()
                    request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
                    found[row] = _read_answer(self._reply(request, stop), read)
                except IndexError:
                    return  # another thread took the last row
                except _Failed as failed:
                    told = f"model {self.model!r} at {self.url}: {failed.told(secret)}"
                    failures.append(BadRow(row, told, failed.wanted))
                    stop.set()
                except Exception as error:
                    failures.append(error)
                    stop.set()

        # Daemons: an interrupted process does not wait for the rows that are left.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(questions)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [found[row] for row in range(len(questions))]

    def _body(self, question: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        told = {"logprobs": True, "top_logprobs": self.alternatives} if self.alternatives else {}
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens, **told}

    def _reply(self, request: urllib.request.Request, stop: threading.Event) -> str:
        wait = FIRST_WAIT
        for attempt in range(self.retries + 1):
            try:
                return _post(request, self.timeout)
            except _Retry as retry:
                if attempt == self.retries or stop.is_set():
                    raise _Failed(f"{retry.why}, in {attempt + 1} attempts", retry.said, _ANSWERING) from None
                stop.wait(min(max(wait, retry.after), LONGEST_WAIT))
                wait *= 2
        raise AssertionError("unreachable")


def found_by(pattern: str, answer: str) -> re.Match[str]:
    """Where the one group of the pattern first matches in an answer. Raises `Unreadable` where it does not."""
    match = re.search(pattern, answer)
    if match is None or match[1] is None:
        raise Unreadable(f"the answer does not match {pattern!r}")
    return match


def _read_answer(reply: str, read: Callable[[Answer], T]) -> T:
    try:
        choice = json.loads(reply)["choices"][0]
        text, tokens = choice["message"]["content"], (choice.get("logprobs") or {}).get("content") or ()
        answer = Answer(text, [(token["token"], _alternatives(token["top_logprobs"])) for token in tokens])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise _Failed("the reply is no chat completion with a text", reply, _COMPATIBLE)
    try:
        return read(answer)
    except Unreadable as error:
        raise _Failed(str(error), text, _MATCHING) from None


def _alternatives(told: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {str(one["token"]): math.exp(one["logprob"]) for one in told}


class _Failed(Exception):
    """Why a request gives no score, and what the server said."""

    def __init__(self, why: str, said: str = "", wanted: str | None = None) -> None:
        super().__init__(why)
        self.why, self.said, self.wanted = why, said, wanted

    def told(self, secret: str | None) -> str:
        """Both, without the key: a server may repeat the headers of a request. Hidden first, then cut."""
        why, said = ((text.replace(secret, "[API key]") if secret else text) for text in (self.why, self.said))
        return f"{why}: {said[:_SHOWN]!r}" if said else why


class _Retry(_Failed):
    """Why a request failed that may succeed later, and the seconds that the server asks to wait."""

    def __init__(self, why: str, said: str = "", after: float = 0.0) -> None:
        super().__init__(why, said)
        self.after = after


class _AsIs(urllib.request.HTTPErrorProcessor):
    """Every reply as it comes: an error is told by its status, and a redirect would carry the key to another place."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def _post(request: urllib.request.Request, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(_AsIs).open(request, timeout=timeout) as reply:
            said = _read(reply, deadline)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        late = isinstance(reason, TimeoutError)
        raise _Retry(f"no reply within {timeout:g} s" if late else f"no connection ({reason!r})") from None
    if 200 <= reply.status < 300:
        return said
    if reply.status in (408, 429) or reply.status >= 500:
        raise _Retry(f"status {reply.status}", said, _seconds(reply.headers.get("Retry-After")))
    raise _Failed(f"status {reply.status}", said, _KNOWN)


def _read(reply: Any, deadline: float) -> str:
    """The body. The deadline bounds the whole of it: a server that drips bytes is late too."""
    body = bytearray()
    while chunk := reply.read1(1 << 16):
        body += chunk
        if len(body) > MAX_REPLY:
            raise _Failed(f"the reply is longer than {MAX_REPLY:,} bytes", wanted=_COMPATIBLE)
        if time.monotonic() > deadline:
            raise TimeoutError
    if reply.length:
        raise http.client.IncompleteRead(bytes(body), reply.length)
    return body.decode("utf-8", "replace")


def _seconds(header: str | None) -> float:
    try:
        return max(float(header or 0), 0.0)
    except ValueError:  # a date: the usual wait will do
        return 0.0


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        got = "not set" if not key else "characters that no HTTP header can hold"
        raise ScoreError("the judge has no API key", where=f"environment variable {variable}", got=got, wanted="a key")
    return key
