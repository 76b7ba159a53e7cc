"""Files that hold secrets, those that must never be half there, and directories that may be somebody else's."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from podwire.hosts.errors import HostError


def make_private(directory: Path, names: Iterable[str]) -> None:
    """The directory, for its owner alone. Raises HostError.

    `names` are what podwire keeps in it. One that is open to others and holds anything else is somebody else's (/etc, or where
    the command happens to run): it is not closed to them, and nothing is put into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if directory.stat().st_mode & 0o077:
            strange = {entry.name for entry in directory.iterdir()} - {*names, "lost+found"}
            if strange:
                raise HostError(f"{directory} is not podwire's: {min(strange)} is in it; choose a directory for podwire alone")
        directory.chmod(0o700)
    except OSError as error:
        raise HostError(f"{directory} cannot be made ({error.strerror}); choose a directory that you may write to") from error


def remove(directory: Path, names: Iterable[str]) -> None:
    """Those files and directories in it that are podwire's; itself, where that leaves nothing."""
    for path in (directory / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Readers see the old content or the new, also after a crash. Raises HostError."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise HostError(f"{path} cannot be written: {error.strerror}") from error


def read(path: Path) -> bytes | None:
    """None where there is no such file. Raises HostError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from error
