"""Forking processes into a pod's namespaces. The shim has one thread, so it may move itself for a moment and come back."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from podwire.kernel import syscalls

_RESET = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SpawnFailed(Exception):
    """A process could not be made; the text is the child's own account of why."""


class Home:
    """The namespaces that the shim itself lives in, to return to."""

    def __init__(self) -> None:
        self._net = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._pid = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def network(self, fd: int, nstype: int = syscalls.CLONE_NEWNET) -> Iterator[None]:
        """Be in the network namespace behind `fd` (a namespace descriptor or a pidfd): sockets opened here stay there."""
        syscalls.setns(fd, nstype)
        try:
            yield
        finally:
            syscalls.setns(self._net, syscalls.CLONE_NEWNET)

    @contextlib.contextmanager
    def new_pids(self) -> Iterator[None]:
        """The next child is PID 1 of a new PID namespace."""
        syscalls.unshare(syscalls.CLONE_NEWPID)
        try:
            yield
        finally:
            syscalls.setns(self._pid, syscalls.CLONE_NEWPID)

    @contextlib.contextmanager
    def pids_of(self, pidfd: int) -> Iterator[None]:
        """The next child goes to the PID namespace of the process behind `pidfd`."""
        syscalls.setns(pidfd, syscalls.CLONE_NEWPID)
        try:
            yield
        finally:
            syscalls.setns(self._pid, syscalls.CLONE_NEWPID)


def spawn(child: Callable[[], None]) -> int:
    """Fork; `child` sets things up and executes the program, and never returns. Returns once it executes.

    Raises SpawnFailed with the text of whatever `child` raised instead."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _run_child(child, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        failure = pipe.read()
    if failure:
        os.waitpid(pid, 0)
        raise SpawnFailed(failure.decode("utf-8", "replace"))
    return pid


def _run_child(child: Callable[[], None], failure: int) -> None:
    text = "the program did not start"
    try:
        for number in _RESET:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        child()
    except BaseException as error:  # the boundary of the child: whatever went wrong is the parent's to report
        text = str(error) or type(error).__name__
    finally:
        with contextlib.suppress(OSError):
            os.write(failure, text.encode()[:4000])
        os._exit(127)


def set_stdio(stdin: int, stdout: int, stderr: int) -> None:
    """Make the three descriptors 0, 1 and 2 of this process."""
    # Move them out of the way first: one of them may itself be 0, 1 or 2.
    moved = [os.dup(fd) for fd in (stdin, stdout, stderr)]
    for target, fd in enumerate(moved):
        os.dup2(fd, target, inheritable=True)


def execute(argv: tuple[str, ...], env: tuple[str, ...]) -> None:
    """Become the program, found by the PATH in `env`. Raises OSError in words that a pod's author understands."""
    environment = dict(item.split("=", 1) for item in env)
    try:
        os.execvpe(argv[0], list(argv), environment)
    except FileNotFoundError:
        where = "no such file" if "/" in argv[0] else "executable file not found in $PATH"
        raise FileNotFoundError(f'exec: "{argv[0]}": {where}') from None
    except OSError as error:
        raise OSError(f'exec: "{argv[0]}": {error.strerror}') from None
