"""From an ordinary process to the lab process: PID 1 of its own user, network, mount, PID, UTS and IPC namespaces.

The launcher (`podwire.lab.launch`) executes this module with an order in its argument. It enters the namespaces, forks the
lab process into the new PID namespace, writes down under which pid the machine knows it, and ends. Whatever is made
in those namespaces (processes, mounts, devices, sockets) goes with the lab process.
"""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from podwire.kernel import syscalls
from podwire.kernel.netns import enter_user_namespace
from podwire.lab.errors import LabError
from podwire.lab.spec import LabSpec
from podwire.lab.state import LabDirectory, LabRecord, start_time

NAMESPACES = (
    syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWIPC
)  # fmt: skip

RUNTIME_DIR = "/run/podwire"
"""In the lab's own mount namespace, on its own tmpfs: it goes with the lab."""

NETNS_DIR = "/run/netns"
"""Where the lab's network namespaces have names (nodes, world, balancer), in the place where `ip netns` looks."""


@dataclass(frozen=True, slots=True)
class BootOrder:
    """What the launcher hands over. `listener`, `lock`, `report` and `leash` are inherited descriptors."""

    spec: LabSpec
    directory: str
    listener: int
    lock: int
    report: int
    leash: int | None = None
    """The lab ends when this pipe is at its end: nobody holds its other end any more."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.listener, self.lock, self.report, *(() if self.leash is None else (self.leash,)))

    def to_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> Self:
        document = json.loads(text)
        return cls(**(document | {"spec": LabSpec.from_json(document["spec"])}))


class Report:
    """The pipe back to the launcher: one JSON object a line, {"step", "seconds"}, {"ready": true} or {"error"}."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def step(self, name: str, seconds: float) -> None:
        self._send({"step": name, "seconds": round(seconds, 4)})

    def ready(self) -> None:
        self._send({"ready": True})

    def error(self, message: str) -> None:
        self._send({"error": message})

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _send(self, document: dict[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(document).encode() + b"\n")


def main() -> int:
    """Runs in a fresh interpreter with a single thread, as entering a user namespace demands."""
    order = BootOrder.from_argument(sys.argv[1])
    for descriptor in order.descriptors:
        os.set_inheritable(descriptor, False)
    report = Report(order.report)
    try:
        enter_user_namespace(NAMESPACES, map_all=True)
    except OSError as error:
        report.error(f"a lab needs namespaces of its own and cannot have them here: {error.strerror or error}")
        return 1
    recorded, written = os.pipe()
    pid = os.fork()
    if pid != 0:
        _record(order, pid)
        os.write(written, b"1")
        return 0
    os.close(written)
    if not os.read(recorded, 1):  # the parent failed: nobody would know us
        return 1
    os.close(recorded)
    return _lab_process(order, report)


def _record(order: BootOrder, pid: int) -> None:
    path = Path(order.directory)
    listener = socket.socket(fileno=os.dup(order.listener))
    port: int = listener.getsockname()[1]
    listener.close()
    record = LabRecord(order.spec.name, pid, start_time(pid), port, order.spec.to_json())
    LabDirectory(path.parent, path.name).write_record(record)


def _lab_process(order: BootOrder, report: Report) -> int:
    """PID 1 from here on."""
    try:
        syscalls.set_process_name("podwire-lab")
        syscalls.sethostname(f"podwire-{order.spec.name}")
        prepare_mounts(Path(order.directory))
    except OSError as error:
        report.error(f"the lab's file systems cannot be prepared: {error.strerror or error}; {_MOUNT_ADVICE}")
        return 1
    from podwire.lab.process import run  # costs a third of a second, which a refused boot need not wait for

    try:
        return run(order, report)
    except LabError as error:
        report.error(str(error))
        return 1


_MOUNT_ADVICE = "inside a container, /proc must not be masked (with Docker: --security-opt systempaths=unconfined)"


def prepare_mounts(state: Path) -> None:
    """A /proc of this PID namespace and an empty /run. `state` stays reachable when it lies below /run. Raises OSError.

    Mounts and unmounts on the machine still arrive here (slave), nothing goes out."""
    syscalls.mount("", "/", flags=syscalls.MS_REC | syscalls.MS_SLAVE)
    syscalls.mount("proc", "/proc", "proc", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
    resolved = state.resolve()
    resolver = Path("/etc/resolv.conf").resolve()
    os.chdir(resolved)  # keeps hold of it while /run is covered
    syscalls.mount("tmpfs", "/run", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=755")
    if resolved.is_relative_to("/run"):
        resolved.mkdir(parents=True)
        syscalls.mount(".", str(resolved), flags=syscalls.MS_BIND)
    os.chdir("/")
    for directory in (RUNTIME_DIR, NETNS_DIR):
        os.makedirs(directory, exist_ok=True)
    if resolver.is_relative_to("/run"):
        # Containers get a resolv.conf of their own mounted over the machine's, which has to lead somewhere for that.
        resolver.parent.mkdir(parents=True, exist_ok=True)
        resolver.touch()


if __name__ == "__main__":
    sys.exit(main())
