"""Directories that a command is given: podwire's own are closed to others, and go; anybody else's stay as they are."""

from pathlib import Path

import pytest

from podwire.hosts.errors import HostError
from podwire.hosts.files import make_private, remove


def mode(directory: Path) -> int:
    return directory.stat().st_mode & 0o777


@pytest.mark.parametrize("found", [None, [], ["own"], ["own", "lost+found"]], ids=str)
def test_ours_is_closed_to_others(tmp_path: Path, found: list[str] | None) -> None:
    directory = tmp_path / "ours"
    for name in found or ():
        (directory / name).mkdir(parents=True)
    if found is not None:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
    make_private(directory, ["own"])
    assert mode(directory) == 0o700


def test_a_directory_that_is_private_may_hold_more(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    tmp_path.chmod(0o700)
    make_private(tmp_path, ["own"])
    assert mode(tmp_path) == 0o700


def test_somebody_elses_is_refused_and_stays_open(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(HostError, match=r"theirs is in it; choose"):
        make_private(tmp_path, ["own"])
    assert mode(tmp_path) == 0o755


def test_only_what_is_ours_goes(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (directory / "pods" / "p1").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (directory / "shim").symlink_to(elsewhere)
    (directory / "theirs").touch()
    remove(directory, ["shim", "pods", "never"])
    assert [entry.name for entry in directory.iterdir()] == ["theirs"]
    assert (elsewhere / "kept").exists()
    (directory / "theirs").unlink()
    remove(directory, ["shim", "pods"])
    assert not directory.exists()
    remove(directory, ["shim"])
