"""Files that hold secrets, and those that must never be half there."""

import os
from pathlib import Path

from podwire.hosts.errors import HostError


def make_private(directory: Path) -> None:
    """The directory, for its owner alone. Raises HostError."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except OSError as error:
        raise HostError(f"{directory} cannot be made ({error.strerror}); choose a directory that you may write to") from error


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
