"""Kernel switches below /proc/sys/net. They belong to the namespace of the thread that opens the file."""

import errno
import os
from collections.abc import Iterable, Mapping

from podwire.kernel.netns import run_in_netns

_ROOT = "/proc/sys"


def write_sysctls(fd: int, values: Mapping[str, str]) -> dict[str, OSError]:
    """Set each key (path below /proc/sys) in the namespace behind `fd`. Returns the refusals by key. Blocks."""

    def work() -> dict[str, OSError]:
        refused: dict[str, OSError] = {}
        for key, value in values.items():
            try:
                _write(sysctl_path(key), value)
            except OSError as error:
                refused[key] = error
        return refused

    return run_in_netns(fd, work)


def read_sysctls(fd: int, keys: Iterable[str]) -> dict[str, str]:
    """The present values in the namespace behind `fd`; keys that this kernel lacks are left out. Blocks."""
    wanted = tuple(keys)
    if not wanted:
        return {}

    def work() -> dict[str, str]:
        values: dict[str, str] = {}
        for key in wanted:
            try:
                with open(sysctl_path(key)) as file:
                    values[key] = " ".join(file.read().split())
            except OSError:
                continue
        return values

    return run_in_netns(fd, work)


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def sysctl_path(key: str) -> str:
    """The file of a switch. Raises OSError for one that no network namespace has."""
    # Only switches of a network namespace: a plan must never reach the machine's own.
    parts = key.split("/")
    if parts[0] != "net" or ".." in parts or "" in parts:
        raise OSError(errno.EINVAL, "only paths below net/ belong to a network namespace")
    return f"{_ROOT}/{key}"
