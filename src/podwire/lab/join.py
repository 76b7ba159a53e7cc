"""Running a command inside a lab's namespaces: the caller's own process enters them, so its terminal is just there."""

import os
import signal
import sys
from collections.abc import Sequence

from podwire.kernel import syscalls
from podwire.kernel.commands import administrators_path
from podwire.lab.boot import NETNS_DIR
from podwire.lab.errors import LabError

# The user namespace first: it is what gives the right to enter the others. The mounts last: /proc leads to the rest.
_ORDER = (
    ("user", syscalls.CLONE_NEWUSER),
    ("net", syscalls.CLONE_NEWNET),
    ("uts", syscalls.CLONE_NEWUTS),
    ("ipc", syscalls.CLONE_NEWIPC),
    ("pid", syscalls.CLONE_NEWPID),
    ("mnt", syscalls.CLONE_NEWNS),
)


def run_in_place(pid: int, place: str, command: Sequence[str]) -> int:
    """Run `command` in the network of `place` (a node, `world`, `balancer`) of the lab whose process is `pid`.

    Moves the calling process, which must have a single thread, into the lab; returns the command's exit status, or 128 plus
    the number of the signal that ended it. Raises LabError."""
    before = os.getcwd()
    _enter(pid, place)
    child = os.fork()  # a PID namespace is entered by the next child
    if child == 0:
        _execute(command, before)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to the command, which shares our terminal
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        signal.signal(signal.SIGINT, previous)
    return status if status >= 0 else 128 - status


def _enter(pid: int, place: str) -> None:
    descriptors: dict[str, int] = {}
    try:
        for name, _ in _ORDER:
            path = f"/proc/{pid}/ns/{name}" if name != "net" else f"/proc/{pid}/root{NETNS_DIR}/{place}"
            descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        for name, kind in _ORDER:
            syscalls.setns(descriptors[name], kind)
    except FileNotFoundError as error:
        raise LabError(
            f"there is no {place} in this lab (any more): `podwire lab ls` shows which labs have which nodes"
        ) from error
    except OSError as error:
        raise LabError(f"the lab's namespaces cannot be entered ({error}): be the user who started it") from error
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _execute(command: Sequence[str], directory: str) -> None:
    try:
        os.chdir(directory)
    except OSError:
        os.chdir("/")
    try:
        # Who has entered is root there, and finds what root finds: nft, say.
        os.execvpe(command[0], list(command), os.environ | {"PATH": administrators_path(os.environ)})
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.stderr.flush()
        # As shells do: 127 there is no such command, 126 it cannot be executed.
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
