"""Forking processes into a pod's namespaces. The shim has one thread, so it may move itself for a moment and come back."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator

from podwire.kernel import syscalls

_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
# PyDLL keeps Python's lock over the call: the child continues with it held, as after os.fork.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_RESET = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SpawnFailed(Exception):
    """A process could not be made; the text is the child's own account of why."""


class Home:
    """The network namespace that the shim itself lives in, to return to."""

    def __init__(self) -> None:
        self._net = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def network(self, fd: int) -> Iterator[None]:
        """Be in the network namespace behind `fd` (a namespace descriptor or a pidfd): sockets opened here stay there."""
        syscalls.setns(fd, syscalls.CLONE_NEWNET)
        try:
            yield
        finally:
            syscalls.setns(self._net, syscalls.CLONE_NEWNET)


def spawn(child: Callable[[], None]) -> int:
    """Fork into a new PID namespace; `child` sets things up and executes the program, and never returns.

    Returns once it executes. Raises SpawnFailed with the text of whatever `child` raised instead."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = _fork_with_new_pids()
    if pid == 0:
        _run_child(lambda: _die_with_shim(child), writing)
    os.close(writing)
    return _started(pid, reading)


def _die_with_shim(child: Callable[[], None]) -> None:
    # Without the shim nobody could ever end the process; and with it, PID 1, the kernel ends all in its namespace.
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    child()


def spawn_beside(pidfd: int, child: Callable[[], None]) -> int:
    """As `spawn`, but into the PID namespace of the process behind `pidfd`.

    By way of a process in between, which the namespace is set for: the shim could not always return to its own (that
    may belong to a user namespace outside). The shim must be a child subreaper, to inherit what that process leaves."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid_reading, pid_writing = os.pipe2(os.O_CLOEXEC)
    between = os.fork()
    if between == 0:
        _run_child(lambda: _fork_beside(pidfd, pid_writing, lambda: _run_child(child, writing)), writing)
    os.close(writing)
    os.close(pid_writing)
    with open(pid_reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(between, 0)
    return _started(int(told), reading) if told else _started(0, reading)


def _fork_beside(pidfd: int, pid_writing: int, child: Callable[[], None]) -> None:
    syscalls.setns(pidfd, syscalls.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        child()
    os.write(pid_writing, b"%d" % pid)
    os._exit(0)


def _fork_with_new_pids() -> int:
    """clone(2) with nothing but CLONE_NEWPID: a fork whose child is PID 1. Python's own bookkeeping after a fork concerns
    threads, of which there are none, so the child may run Python until it executes something."""
    number = _SYS_CLONE.get(os.uname().machine)
    if number is None:
        raise SpawnFailed(f"pods cannot be made on {os.uname().machine}: only on {', '.join(_SYS_CLONE)}")
    zero = ctypes.c_long(0)
    flags = ctypes.c_long(syscalls.CLONE_NEWPID | signal.SIGCHLD)
    pid = int(_libc.syscall(ctypes.c_long(number), flags, zero, zero, zero, zero))
    if pid < 0:
        code = ctypes.get_errno()
        raise SpawnFailed(f"a new process could not be made: {os.strerror(code)}")
    return pid


def _started(pid: int, reading: int) -> int:
    with open(reading, "rb") as pipe:
        failure = pipe.read()
    if failure:
        if pid:
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
