"""Folders that are either complete and verified, or ignored.

A folder is filled under a temporary name, hashed into a manifest, forced to disk and renamed into place. Whatever
moment a process is killed at, what carries a final name is whole; whatever happens to it afterwards is found by its
SHA-256 sums (safetensors has no checksum of its own).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from stepwise.errors import CheckpointError

MANIFEST = "manifest.json"
_STEP = "step-"
_TEMPORARY = ".tmp-"


def commit(target: Path, fill: Callable[[Path], None]) -> Path:
    """Create folder `target` with what `fill(folder)` writes, all or nothing, and return it.

    Raises `CheckpointError` when the disk is full or the place cannot be written; an earlier folder of that name
    survives.
    """
    temporary = target.with_name(f"{_TEMPORARY}{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        sums = {str(p.relative_to(temporary)): _sha256(p) for p in _files(temporary)}
        (temporary / MANIFEST).write_text(json.dumps({"folder": target.name, "sha256": sums}, indent=1))
        for path in [*_files(temporary), *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _sync(path)
        if target.exists():
            discard(target)
        temporary.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors report a full disk as their own
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"A checkpoint could not be written ({type(error).__name__}: {error}); earlier ones are untouched",
            where=target,
            wanted="a writable folder with enough free space",
        ) from error
    return target


def verify(folder: Path) -> None:
    """Compare every file with the manifest; raise `CheckpointError` naming the first that is missing, foreign or
    altered."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        sums, name = dict(manifest["sha256"]), manifest["folder"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("The manifest is missing or unreadable", where=folder / MANIFEST) from error
    if name != folder.name:
        raise CheckpointError("The manifest belongs to another folder", where=folder / MANIFEST, got=name)
    present = {str(p.relative_to(folder)) for p in _files(folder)} - {MANIFEST}
    for file in sorted(present ^ set(sums)):
        raise CheckpointError(f"A file is {'foreign' if file in present else 'missing'}", where=folder / file)
    for file, expected in sums.items():
        if _sha256(folder / file) != expected:
            raise CheckpointError("A file is damaged: its SHA-256 differs from the manifest", where=folder / file)


def save_step(parent: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Commit the checkpoint of one step and drop all but the newest `keep`."""
    folder = commit(parent / f"{_STEP}{step:08d}", fill)
    for old in steps(parent)[:-keep]:
        discard(old)
    return folder


def steps(parent: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first, whether good or damaged."""
    return sorted(p for p in parent.glob(f"{_STEP}*") if p.is_dir())


def newest(parent: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; None if there is none at all. Damaged ones are named through `warn`.

    Raises `CheckpointError` when checkpoints exist and none is good: training never restarts at zero in silence.
    """
    sweep(parent)
    found = steps(parent)
    for folder in reversed(found):
        try:
            verify(folder)
        except CheckpointError as error:
            warn(f"Checkpoint skipped. {error}")
        else:
            return folder
    if found:
        raise CheckpointError(
            "All checkpoints are damaged",
            where=parent,
            got=", ".join(p.name for p in found),
            wanted="at least one good checkpoint; delete the folder to start this stage again on purpose",
        )
    return None


def discard(folder: Path) -> None:
    """Remove a folder so that no half-removed rest can pass for a checkpoint."""
    grave = folder.with_name(f"{_TEMPORARY}discarded-{folder.name}-{os.getpid()}")
    folder.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what killed processes left behind."""
    for stale in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; raise `CheckpointError` when another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise CheckpointError(f"The folder cannot be used: {error.strerror}", where=folder) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError("Another process is working in this folder", where=folder) from error
        yield


def write_text(path: Path, text: str) -> None:
    """Replace a small text file, all or nothing."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
