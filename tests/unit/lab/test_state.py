"""A lab's directory: the lock says who lives, files are private, and nothing of another user is trusted."""

import os
import stat
from pathlib import Path

import pytest

from podwire.lab.errors import LabError
from podwire.lab.state import LabDirectory, LabRecord, labs, start_time, state_root, write_private

RECORD = LabRecord("ci", os.getpid(), start_time(os.getpid()), 6443, {"nodes": 3})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "labs"


def test_a_lab_lives_as_long_as_its_lock_is_held(root: Path) -> None:
    directory = LabDirectory(root, "ci")
    lock = directory.create()
    directory.write_record(RECORD)
    assert directory.alive
    assert directory.live_record() == RECORD
    assert [record for _, record in labs(root)] == [RECORD]
    os.close(lock)
    with pytest.raises(LabError, match="no lab named 'ci' is up"):
        directory.live_record()


def test_dead_labs_are_pruned_and_their_names_are_free(root: Path) -> None:
    directory = LabDirectory(root, "ci")
    os.close(directory.create())
    directory.database.write_text("old")
    assert list(labs(root)) == []
    assert not directory.path.exists()
    os.close(directory.create())
    directory.database.write_text("old")
    lock = directory.create()
    assert not directory.database.exists()
    os.close(lock)


def test_a_name_in_use_is_refused_and_nothing_of_it_touched(root: Path) -> None:
    directory = LabDirectory(root, "ci")
    lock = directory.create()
    directory.database.write_text("mine")
    with pytest.raises(LabError, match="is up already"):
        LabDirectory(root, "ci").create()
    directory.remove()
    assert directory.database.read_text() == "mine"
    os.close(lock)


def test_several_labs_live_side_by_side(root: Path) -> None:
    locks = [LabDirectory(root, name).create() for name in ("b", "a")]
    for name in ("b", "a"):
        LabDirectory(root, name).write_record(LabRecord(name, 1, 1, 1))
    assert [record.name for _, record in labs(root)] == ["a", "b"]
    for lock in locks:
        os.close(lock)


def test_other_directories_are_left_alone(root: Path) -> None:
    (root / "something").mkdir(parents=True)
    (root / "Not A Lab").mkdir()
    assert list(labs(root)) == []
    assert (root / "something").exists()


def test_files_are_for_their_owner_only(root: Path) -> None:
    lock = LabDirectory(root, "ci").create()
    path = root / "ci" / "kubeconfig"
    write_private(path, "token")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    os.close(lock)


def test_a_root_that_others_can_write_to_is_refused(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(LabError, match="belongs to another user or is open to others"):
        LabDirectory(root, "ci").create()


def test_where_labs_are_kept(tmp_path: Path) -> None:
    uid = os.getuid()
    home, runtime = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    runtime.mkdir()
    assert state_root({"PODWIRE_STATE_DIR": "/x/y"}, uid) == Path("/x/y")
    assert state_root({"XDG_RUNTIME_DIR": str(runtime), "HOME": str(home)}, uid) == runtime / "podwire"
    assert state_root({"XDG_RUNTIME_DIR": "/nowhere", "HOME": str(home)}, uid) == home / ".local" / "state" / "podwire"
    assert state_root({"XDG_RUNTIME_DIR": "/nowhere"}, uid) == Path(f"/tmp/podwire-{uid}")


def test_start_time_of_nobody_is_zero() -> None:
    assert start_time(os.getpid()) > 0
    assert start_time(2**22 + 1) == 0
