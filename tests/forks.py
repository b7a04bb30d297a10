"""Work in forked children that end early: by a signal from outside, or just before their k-th operation on files."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch

from stepwise.errors import StepwiseError

NEVER = 1 << 30
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, negative for a signal; what its work returned; its error."""

    code: int
    value: Any
    error: str


def fork(work: Callable[[], Any], *, watch: Callable[[int], None] = lambda pid: None) -> Ended:
    """Run `work` in a forked child and wait; `watch(pid)` may end it early. A `StepwiseError` gives its exit code."""
    gc.freeze()  # a collection in the child would copy all of the parent's memory
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code, said = _finish(work)
        try:
            os.write(writing, json.dumps(said).encode())
        finally:
            os._exit(code)
    os.close(writing)
    watch(pid)
    with os.fdopen(reading, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    said = json.loads(text) if text else {"value": None, "error": ""}
    return Ended(os.waitstatus_to_exitcode(status), said["value"], said["error"])


def _finish(work: Callable[[], Any]) -> tuple[int, dict[str, Any]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return 0, {"value": work(), "error": ""}
    except StepwiseError as error:
        return error.exit_code, {"value": None, "error": f"{type(error).__name__}: {error}"}
    except SystemExit as error:
        return int(error.code or 0), {"value": None, "error": ""}
    except BaseException as error:
        return 1, {"value": None, "error": "".join(traceback.format_exception(error))[-8000:]}


class KillAt:
    """Within `with`, ends this process with SIGKILL just before its k-th operation on files: opening, writing tensors,
    fsync, rename, mkdir, removal. For children only: an audit hook cannot be taken back."""

    def __init__(self, k: int) -> None:
        self.k, self.count, self.armed = k, 0, False
        fsync, save_file = os.fsync, safetensors.torch.save_file

        def counted_fsync(descriptor: int) -> None:
            self.tick()
            fsync(descriptor)

        def counted_save_file(*arguments: Any, **settings: Any) -> None:
            self.tick()
            save_file(*arguments, **settings)
            self.tick()

        os.fsync = counted_fsync
        for module in [m for name, m in sys.modules.items() if name.startswith(("stepwise", "safetensors.torch"))]:
            if getattr(module, "save_file", None) is save_file:
                module.save_file = counted_save_file  # type: ignore[attr-defined]
        sys.addaudithook(lambda event, _: self.tick() if event in _EVENTS else None)

    def tick(self) -> None:
        if self.armed:
            self.count += 1
            if self.count == self.k:
                os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> KillAt:
        self.armed = True
        return self

    def __exit__(self, *_: object) -> None:
        self.armed = False
