"""A pod's sandbox in the shim: its pause process and the containers that live in its namespaces."""

import os
import signal
from dataclasses import dataclass, field

from podwire.kernel import syscalls
from podwire.runtime.shim.logfile import LogFile, LogPipe
from podwire.runtime.shim.messages import ContainerRecord, ContainerSpec, SandboxSpec
from podwire.runtime.shim.mounts import enter_filesystem
from podwire.runtime.shim.spawn import execute, set_stdio, spawn, spawn_beside
from podwire.runtime.shim.standin import StandIn

_POD_NAMESPACES = syscalls.CLONE_NEWNET | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC


@dataclass(slots=True)
class Container:
    """A run of a container: what was asked for, what became of it, and what it holds while it runs."""

    spec: ContainerSpec
    record: ContainerRecord
    log: LogFile
    pidfd: int = -1
    pipes: tuple[LogPipe, ...] = ()
    stand_in: StandIn | None = None


@dataclass(slots=True)
class PodSandbox:
    spec: SandboxSpec
    node: str
    pid: int
    pidfd: int
    containers: dict[str, Container] = field(default_factory=dict)


def spawn_pause(spec: SandboxSpec, program: str, node_net: int) -> int:
    """Fork the pause process into new namespaces; returns its pid. Raises SpawnFailed."""

    def child() -> None:
        flags = syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC
        if spec.host_network:
            syscalls.setns(node_net, syscalls.CLONE_NEWNET)
        else:
            flags |= syscalls.CLONE_NEWNET
        syscalls.unshare(flags)
        syscalls.sethostname(spec.hostname[:63])
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        set_stdio(null, null, null)
        os.chdir("/")
        os.execve(program, ["/pause"], {})

    return spawn(child)


def spawn_container(sandbox: PodSandbox, spec: ContainerSpec, output: tuple[int, int]) -> int:
    """Fork a container's process as PID 1 of its own PID namespace (of the pod's, where that is shared). Raises SpawnFailed."""

    def child() -> None:
        syscalls.setns(sandbox.pidfd, _POD_NAMESPACES)
        enter_filesystem(spec.mounts, spec.stage, (spec.cwd,) if spec.cwd else ())
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        set_stdio(null, *output)
        os.chdir(spec.cwd or "/")
        execute(spec.argv, spec.env)

    return spawn_beside(sandbox.pidfd, child) if sandbox.spec.share_pids else spawn(child)


def spawn_exec(sandbox: PodSandbox, container: Container, argv: tuple[str, ...], stdio: tuple[int, int, int], tty: bool) -> int:
    """Fork another process into a container; with `tty`, descriptor 0 becomes its controlling terminal. Raises SpawnFailed."""
    spec = container.spec
    process = container.pidfd if container.stand_in is None else -1

    def child() -> None:
        if process >= 0:
            syscalls.setns(process, _POD_NAMESPACES | syscalls.CLONE_NEWNS)
        else:  # a stand-in has no process: its view of the file system is made for the occasion
            syscalls.setns(sandbox.pidfd, _POD_NAMESPACES)
            enter_filesystem(spec.mounts, spec.stage, (spec.cwd,) if spec.cwd else ())
        os.setsid()
        set_stdio(*stdio)
        if tty:
            _take_terminal()
        os.chdir(spec.cwd or "/")
        execute(argv, spec.env)

    return spawn_beside(process if process >= 0 else sandbox.pidfd, child)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
