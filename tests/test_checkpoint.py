"""Folders that are complete and verified, or ignored: whatever kills the process, fills the disk or alters a file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import NEVER, KillAt, fork
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stepwise import checkpoint
from stepwise.errors import CheckpointError, NonFiniteError


def filler(text: str) -> Callable[[Path], None]:
    """Writes two files, one in a folder of its own, that hold `text`."""

    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "text.json").write_text(json.dumps(text))
        save_file({"tensor": torch.tensor([len(text)])}, folder / "tensor.safetensors")

    return fill


def text_of(folder: Path) -> str:
    checkpoint.verify(folder)
    text: str = json.loads((folder / "inner" / "text.json").read_text())
    return text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def newest(folder: Path) -> Path | None:
    return checkpoint.newest(folder, warn=lambda text: None)


def count_operations(work: Callable[[], object]) -> int:
    def counted() -> int:
        with KillAt(NEVER) as kill:
            work()
        return kill.count

    ended = fork(counted)
    assert ended.code == 0, ended.error
    return int(ended.value)


def kill_at(k: int, work: Callable[[], object]) -> None:
    def killed() -> None:
        with KillAt(k):
            work()

    assert fork(killed).code == -signal.SIGKILL


# --- kills at every boundary ------------------------------------------------------------------------------------------


def prepared(folder: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.save_step(folder, step, filler(f"step {step}"), keep=2)
    return folder


def test_a_kill_before_any_operation_of_a_save_leaves_the_newest_good_step(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        checkpoint.save_step(folder, 3, filler("step 3"), keep=2)

    before = prepared(tmp_path / "before", 1, 2)
    dry = shutil.copytree(before, tmp_path / "dry")
    operations = count_operations(lambda: save(dry))
    assert operations > 25
    seen = set()
    for k in range(1, operations + 1):
        folder = shutil.copytree(before, tmp_path / f"run {k}")
        kill_at(k, lambda folder=folder: save(folder))  # type: ignore[misc]
        found = newest(folder)
        assert found is not None and found.name in {"step-00000002", "step-00000003"}
        assert text_of(found) == f"step {int(found.name[5:])}"
        seen.add(found.name)
        assert names(folder) == [p.name for p in checkpoint.steps(folder)]
    assert seen == {"step-00000002", "step-00000003"}


def test_a_kill_before_any_operation_keeps_the_earlier_folder_of_the_same_name_or_the_new_one(tmp_path: Path) -> None:
    def replace(parent: Path) -> None:
        checkpoint.commit(parent / "adapter", filler("new"))

    checkpoint.commit(tmp_path / "before" / "adapter", filler("old"))
    dry = shutil.copytree(tmp_path / "before", tmp_path / "dry")
    operations = count_operations(lambda: replace(dry))
    seen = set()
    for k in range(1, operations + 1):
        parent = shutil.copytree(tmp_path / "before", tmp_path / f"run {k}")
        kill_at(k, lambda parent=parent: replace(parent))  # type: ignore[misc]
        checkpoint.sweep(parent)
        seen.add(text_of(parent / "adapter"))
        assert names(parent) == ["adapter"]
    assert seen == {"old", "new"}


def test_a_kill_while_a_text_file_is_replaced_leaves_the_old_text_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("old")
    operations = count_operations(lambda: checkpoint.write_text(file, "new"))
    for k in range(1, operations + 1):
        file.write_text("old")
        kill_at(k, lambda: checkpoint.write_text(file, "new"))
        assert file.read_text() in {"old", "new"}
        checkpoint.sweep(tmp_path)
        assert names(tmp_path) == ["log.jsonl"]


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.commit(tmp_path_factory.mktemp("good") / "folder", filler("a text " * 9))


@given(data=st.data())
def test_every_flipped_bit_is_found_and_the_folder_named(good: Path, data: st.DataObject) -> None:
    file = good / data.draw(st.sampled_from(["manifest.json", "inner/text.json", "tensor.safetensors"]))
    whole = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(good)):
            checkpoint.verify(good)
    finally:
        file.write_bytes(whole)
    checkpoint.verify(good)


@pytest.mark.parametrize("file", ["manifest.json", "inner/text.json", "tensor.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    folder = checkpoint.commit(tmp_path / "folder", filler("text"))
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        checkpoint.verify(folder)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    folder = checkpoint.commit(tmp_path / "folder", filler("text"))
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"foreign.*adapter_model\.bin"):
        checkpoint.verify(folder)


def test_a_file_that_became_a_folder_or_cannot_be_read_is_damage_not_a_crash(tmp_path: Path) -> None:
    folder = checkpoint.commit(tmp_path / "folder", filler("text"))
    (folder / "tensor.safetensors").unlink()
    (folder / "tensor.safetensors").symlink_to("/proc/self/mem")  # exists, opens, and fails when read
    with pytest.raises(CheckpointError, match=r"tensor\.safetensors"):
        checkpoint.verify(folder)


def test_a_manifest_that_lists_something_else_than_sums_is_named(tmp_path: Path) -> None:
    folder = checkpoint.commit(tmp_path / "folder", filler("text"))
    for text in ("", "[]", "{}", '{"folder": "folder", "sha256": 7}', '{"folder": "folder", "sha256": [1]}', "\0" * 64):
        (folder / checkpoint.MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoint.verify(folder)


def test_folders_that_changed_places_are_found(tmp_path: Path) -> None:
    parent = prepared(tmp_path / "run", 1, 2)
    (parent / "step-00000001").rename(parent / "aside")
    (parent / "step-00000002").rename(parent / "step-00000001")
    (parent / "aside").rename(parent / "step-00000002")
    with pytest.raises(CheckpointError, match="All checkpoints are damaged"):
        newest(parent)


# --- which one is used -----------------------------------------------------------------------------------------------


def damage(folder: Path) -> None:
    (folder / "tensor.safetensors").write_bytes(b"")


def test_the_previous_good_step_is_used_and_the_damaged_one_named(tmp_path: Path) -> None:
    parent = prepared(tmp_path / "run", 1, 2)
    damage(parent / "step-00000002")
    warnings: list[str] = []
    found = checkpoint.newest(parent, warn=warnings.append)
    assert found == parent / "step-00000001"
    assert len(warnings) == 1 and "step-00000002/tensor.safetensors" in warnings[0]


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing yet") is None
    parent = prepared(tmp_path / "run", 1, 2)
    damage(parent / "step-00000001")
    damage(parent / "step-00000002")
    with pytest.raises(CheckpointError, match=r"step-00000001, step-00000002.*at least one good"):
        newest(parent)


def test_damaged_later_steps_never_push_out_the_good_one(tmp_path: Path) -> None:
    parent = tmp_path / "run"
    for step in (5, 10, 15):
        checkpoint.save_step(parent, step, filler(f"step {step}"), keep=3)
    damage(parent / "step-00000010")
    damage(parent / "step-00000015")
    assert newest(parent) == parent / "step-00000005"
    checkpoint.save_step(parent, 6, filler("step 6"), keep=2)
    assert newest(parent) == parent / "step-00000006"
    assert names(parent) == ["step-00000005", "step-00000006"]


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    assert names(prepared(tmp_path / "run", 1, 2, 10, 200)) == ["step-00000010", "step-00000200"]


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    parent = prepared(tmp_path / "run", 1, 2)
    shutil.copytree(parent / "step-00000002", parent / "step-00000002-copy")
    (parent / "step-notes").mkdir()
    (parent / "step-00000009").write_text("a file")
    assert newest(parent) == parent / "step-00000002"
    prepared_names = {"step-00000002-copy", "step-notes", "step-00000009"}
    checkpoint.save_step(parent, 3, filler("step 3"), keep=1)
    assert set(names(parent)) == prepared_names | {"step-00000003"}


def test_leftovers_of_killed_processes_are_swept(tmp_path: Path) -> None:
    parent = prepared(tmp_path / "run", 1, 2)
    (parent / ".tmp-step-00000003-4242").mkdir()
    (parent / ".tmp-step-00000003-4242" / "half").write_text("torso")
    (parent / ".tmp-log.jsonl-4242").write_text("torso")
    assert newest(parent) == parent / "step-00000002"
    assert names(parent) == ["step-00000001", "step-00000002"]


def test_a_leftover_of_the_same_process_number_is_no_obstacle(tmp_path: Path) -> None:
    """Process numbers repeat in containers."""
    parent = prepared(tmp_path / "run", 1, 2)
    for name in (f"step-00000003-{os.getpid()}", f"discarded-step-00000001-{os.getpid()}"):
        (parent / f".tmp-{name}").mkdir()
        (parent / f".tmp-{name}" / "half").write_text("torso")
    checkpoint.save_step(parent, 3, filler("step 3"), keep=2)
    assert text_of(parent / "step-00000003") == "step 3"
    assert not (parent / "step-00000001").exists()


# --- places that cannot be written -----------------------------------------------------------------------------------


def refuses(parent: Path, match: str) -> None:
    """One more save fails with one clear error, leaves nothing behind, and the one before still loads."""
    before = names(parent)
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.save_step(parent, 3, lambda folder: save_file({"x": torch.zeros(1 << 19)}, folder / "x"), keep=2)
    assert str(parent / "step-00000003") in str(caught.value) and "\n" not in str(caught.value)
    assert names(parent) == before
    found = newest(parent)
    assert found is not None and text_of(found) == "step 2"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk; a limit of the file size stands in for it elsewhere")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_clear_error_and_the_previous_checkpoint_loads(full_disk: Path) -> None:
    refuses(prepared(full_disk / "run", 1, 2), "No space left on device")


def test_a_full_disk_is_a_clear_error_for_small_files_too(full_disk: Path) -> None:
    file = full_disk / "log.jsonl"
    checkpoint.write_text(file, "old")
    with (full_disk / "ballast").open("wb") as handle, pytest.raises(OSError, match="No space left"):
        handle.write(b"1" * (2 << 20))
    with pytest.raises(CheckpointError, match=r"log\.jsonl.*"):
        checkpoint.write_text(file, "new" * 5000)
    assert file.read_text() == "old" and names(full_disk) == ["ballast", "log.jsonl"]


def test_a_file_size_limit_is_one_clear_error_and_the_previous_checkpoint_loads(tmp_path: Path) -> None:
    parent = prepared(tmp_path / "run", 1, 2)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        refuses(parent, "File too large")

    ended = fork(limited)
    assert ended.code == 0, ended.error


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    parent = prepared(tmp_path / "run", 1, 2)
    if os.geteuid() != 0:
        lock, unlock = ["chmod", "a-w", str(parent)], ["chmod", "u+w", str(parent)]
    else:  # permissions do not bind root, this flag does
        lock, unlock = ["chattr", "+i", str(parent)], ["chattr", "-i", str(parent)]
    if shutil.which(lock[0]) is None or subprocess.run(lock, capture_output=True).returncode != 0:
        pytest.skip("no way to make a folder read-only here")
    try:
        refuses(parent, "not permitted|denied")
    finally:
        subprocess.run(unlock, check=True)


@pytest.mark.parametrize("place", ["file", "file/under"])
def test_a_file_in_the_way_is_one_clear_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file"):
        checkpoint.save_step(tmp_path / place, 1, filler("step 1"), keep=2)
    with pytest.raises(CheckpointError, match="file"), checkpoint.exclusive(tmp_path / place):
        pass
    with pytest.raises(CheckpointError, match="file"):
        newest(tmp_path / place)
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_error_of_the_content_keeps_its_kind_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("torso")
        raise NonFiniteError("a loss")

    with pytest.raises(NonFiniteError):
        checkpoint.commit(tmp_path / "folder", fill)
    assert names(tmp_path) == []


# --- one process at a time -------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_while_the_first_lives_and_welcome_when_it_was_killed(tmp_path: Path) -> None:
    def enter() -> None:
        with checkpoint.exclusive(tmp_path / "run"):
            pass

    with checkpoint.exclusive(tmp_path / "run"):
        ended = fork(enter)
        assert ended.code == CheckpointError.exit_code and "Another process" in ended.error

    def hold() -> None:
        with checkpoint.exclusive(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(hold).code == -signal.SIGKILL
    assert fork(enter).code == 0
