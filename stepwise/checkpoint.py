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
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from stepwise.errors import CheckpointError

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"  # half written, or half removed
_ASIDE = ".old-"  # whole, while a new folder takes its name


def commit(target: Path, fill: Callable[[Path], None]) -> Path:
    """Create folder `target` with what `fill(folder)` writes, all or nothing, and return it.

    Raises `CheckpointError` when the disk is full or the place cannot be written; an earlier folder of that name
    survives.
    """
    temporary = target.with_name(f"{_TEMPORARY}{target.name}-{os.getpid()}")
    with writing(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.mkdir()
            fill(temporary)
            sums = {str(p.relative_to(temporary)): _sha256(p) for p in _files(temporary)}
            (temporary / MANIFEST).write_text(json.dumps({"folder": target.name, "sha256": sums}, indent=1))
            for path in [*_files(temporary), *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                _sync(path)
            _put(temporary, target)
        finally:
            _remove(temporary)
    return target


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what a full disk or a forbidden place raises within into one `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors report a full disk as their own
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"This could not be written ({type(error).__name__}: {reason}); what was there before is untouched",
            where=target,
            wanted="a writable place with enough free space",
        ) from error


def verify(folder: Path) -> None:
    """Compare every file with the manifest; raise `CheckpointError` naming the first that is missing, foreign or
    altered."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        sums, name = dict(manifest["sha256"]), manifest["folder"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "The manifest is missing or unreadable",
            where=folder / MANIFEST,
            wanted="a folder that stepwise finished; restore it, or delete it to make it anew",
        ) from error
    if name != folder.name:
        raise CheckpointError(
            "The manifest belongs to another folder",
            where=folder / MANIFEST,
            got=name,
            wanted="the folder under the name that it was written with",
        )
    present = {str(p.relative_to(folder)) for p in _files(folder)} - {MANIFEST}
    for file in sorted(present ^ set(sums)):
        raise CheckpointError(
            f"A file is {'foreign' if file in present else 'missing'}",
            where=folder / file,
            wanted="the files that the manifest lists, and no others",
        )
    for file, expected in sums.items():
        try:
            found = _sha256(folder / file)
        except OSError as error:
            raise CheckpointError(
                f"A file cannot be read: {error.strerror}", where=folder / file, wanted="a file that can be read"
            ) from error
        if found != expected:
            raise CheckpointError(
                "A file is damaged: its SHA-256 differs from the manifest",
                where=folder / file,
                wanted="the file as it was written; restore it, or delete the folder to make it anew",
            )


def save_step(parent: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Commit the checkpoint of one step; drop all but the newest `keep` and any of a later step, which is void."""
    folder = commit(parent / f"step-{step:08d}", fill)
    found = steps(parent)
    until = found.index(folder) + 1
    with writing(parent):
        for old in found[: max(0, until - keep)] + found[until:]:
            _discard(old)
    return folder


def steps(parent: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first, whether good or damaged."""
    numbers = {p: int(match[1]) for p in parent.glob("step-*") if (match := _STEP.fullmatch(p.name)) and p.is_dir()}
    return sorted(numbers, key=numbers.__getitem__)


def newest(parent: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; None if there is none at all. Damaged ones are named through `warn`.

    Raises `CheckpointError` when checkpoints exist and none is good: training never restarts at zero in silence. Also
    when `parent` cannot be a folder, which is better known before the first step than at the first save.
    """
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
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


def sweep(parent: Path) -> None:
    """Remove what killed processes left behind, and give back its name to a folder that was being replaced."""
    for aside in parent.glob(f"{_ASIDE}*"):
        target = aside.with_name(aside.name.removeprefix(_ASIDE))
        if target.exists():
            _remove(aside)
        else:
            aside.rename(target)
    for stale in parent.glob(f"{_TEMPORARY}*"):
        _remove(stale)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; raise `CheckpointError` when another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise CheckpointError(
            f"The folder cannot be used: {error.strerror}", where=folder, wanted="a folder that can be written to"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                "Another process is working in this folder",
                where=folder,
                wanted="a folder of its own for every run: wait for that process to end, or name another `--output`",
            ) from error
        yield


def held(folder: Path) -> bool:
    """Whether a process works in this folder now."""
    with suppress(FileNotFoundError), (folder / ".lock").open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def write_text(path: Path, text: str) -> None:
    """Replace a small text file, all or nothing. Raises `CheckpointError` when it cannot be written."""
    write_file(path, lambda temporary: temporary.write_text(text))


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace a file with what `fill(path)` writes, all or nothing; raises as `write_text`."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    with writing(path):
        try:
            fill(temporary)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            _remove(temporary)


def _put(new: Path, target: Path) -> None:
    """Rename into place; at every moment the earlier folder of that name is whole, there or aside, or the new one."""
    aside = target.with_name(f"{_ASIDE}{target.name}")
    if target.exists():
        _remove(aside)
        target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    _remove(aside)


def _discard(folder: Path) -> None:
    """Remove a folder so that no half-removed rest can pass for a checkpoint."""
    grave = folder.with_name(f"{_TEMPORARY}discarded-{folder.name}-{os.getpid()}")
    _remove(grave)
    folder.rename(grave)
    _remove(grave)


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; what cannot be removed stays for the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


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
