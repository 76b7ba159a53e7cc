"""Starting the shim, and speaking to it: one client per node, all to the same process."""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import podwire
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.shim.messages import ContainerRecord, ContainerSpec, Message, SandboxSpec, fields_of
from podwire.runtime.shim.packets import PacketSocket

_WHO_SECONDS = 5.0
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from podwire.runtime.shim.main import main; main()"


@dataclass(frozen=True, slots=True)
class ShimProcess:
    """A shim that runs: the socket that it serves, its pid, and a pidfd to wait on (readable once it has ended)."""

    socket_path: Path
    pid: int
    pidfd: int

    def stop(self) -> None:
        """End it and thereby all its pods; returns when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        select.select([self.pidfd], [], [])
        with contextlib.suppress(ChildProcessError):  # not ours, where an earlier process started it
            os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.socket_path.unlink(missing_ok=True)


def start_shim(root: Path) -> ShimProcess:
    """Start the shim, with its files and socket (`shim.sock`, `shim.log`) in `root`. Usable at once: the socket listens.

    It is a child of this process but not tied to it; it ends by `stop`, or with the PID namespace."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = root / "shim.sock"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = os.open(root / "shim.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _bind_in(listener, path)
        listener.listen(256)
        source = str(Path(podwire.__file__).parent.parent)
        # posix_spawn, not fork: the lab's process is large and has threads.
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-B", "-c", _BOOT, source, str(root), "3"],
            dict(os.environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
                (os.POSIX_SPAWN_DUP2, listener.fileno(), 3),
            ],
        )
    finally:
        listener.close()
        os.close(log)
        os.close(null)
    return ShimProcess(path, pid, os.pidfd_open(pid))


def join_shim(root: Path) -> ShimProcess:
    """The shim of `root` if one runs (from before this process was started: pods outlive their agent), else a new one."""
    path = root / "shim.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            _connect_in(sock, path)
            # Its own word, not SO_PEERCRED: that would be the process that opened the listener for it.
            sock.settimeout(_WHO_SECONDS)
            sock.send(json.dumps({"id": 0, "do": "who"}).encode())
            pid = int(json.loads(sock.recv(4096))["ok"]["pid"])
            return ShimProcess(path, pid, os.pidfd_open(pid))
        except OSError:
            return start_shim(root)


def _connect_in(sock: socket.socket, path: Path) -> None:
    directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def _bind_in(sock: socket.socket, path: Path) -> None:
    """Bind to `path`, also where it is longer than the 107 bytes a socket address holds."""
    directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


class ShimClient:
    """One node's view of the shim. Callbacks come in the order in which things happened.

    `on_container(record)`: a container started or ended. `on_gone(uid)`: a pod's pause process was killed by someone.
    `on_lost()`: the shim itself has ended, and all pods with it.
    """

    def __init__(
        self,
        on_container: Callable[[ContainerRecord], None],
        on_gone: Callable[[str], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_container, self._on_gone, self._on_lost = on_container, on_gone, on_lost
        self._packets: PacketSocket | None = None
        self._number = 0
        self._answers: dict[int, asyncio.Future[tuple[Message, list[int]]]] = {}
        self._execs: dict[int, asyncio.Future[int]] = {}
        self._growth: dict[str, list[asyncio.Future[None]]] = {}
        self._found: list[tuple[SandboxSpec, int]] = []
        self._records: list[ContainerRecord] = []
        self._greeting = False

    async def connect(self, path: Path, node: str, netns: str) -> tuple[list[tuple[SandboxSpec, int]], list[ContainerRecord]]:
        """Join the shim at `path` as `node`, whose network namespace is at `netns`.

        Returns the node's sandboxes with the pids of their pause processes, and all container runs it remembers."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _connect_in(sock, path)
        except OSError as error:
            sock.close()
            raise RuntimeFailure(f"the pod runtime's shim at {path} does not answer: {error.strerror}") from error
        self._packets = PacketSocket(sock, self._on_packet, self._shim_ended)
        net = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        self._greeting, self._found, self._records = True, [], []
        try:
            await self._ask({"do": "hello", "node": node}, [net])
        finally:
            self._greeting = False
            os.close(net)
        return self._found, self._records

    def close(self) -> None:
        if self._packets is not None:
            self._packets.close()
        self._let_go()

    async def sandbox(self, spec: SandboxSpec) -> int:
        """Make a sandbox, or find the one of that uid; returns the pause process's pid."""
        answer, _ = await self._ask({"do": "sandbox", "sandbox": fields_of(spec)}, reason="FailedCreatePodSandBox")
        return int(answer["pid"])

    async def run(self, spec: ContainerSpec) -> ContainerRecord:
        answer, _ = await self._ask({"do": "run", "container": fields_of(spec)})
        return ContainerRecord(**answer["container"])

    async def kill(self, record: ContainerRecord, number: int) -> None:
        """Send a signal to a container's main process; nothing if it has ended or is forgotten."""
        with contextlib.suppress(RuntimeFailure):
            await self._ask({"do": "kill", "uid": record.uid, "cid": record.cid, "signal": number})

    async def forget(self, record: ContainerRecord) -> None:
        """Drop the memory of an ended run."""
        with contextlib.suppress(RuntimeFailure):
            await self._ask({"do": "forget", "uid": record.uid, "cid": record.cid})

    async def note(self, record: ContainerRecord, note: str) -> None:
        """Keep a text with the container, for whoever connects next."""
        with contextlib.suppress(RuntimeFailure):
            await self._ask({"do": "note", "uid": record.uid, "cid": record.cid, "note": note})

    async def remove(self, uid: str) -> None:
        """Kill all of a pod; returns when every process is gone."""
        await self._ask({"do": "remove", "uid": uid})

    async def open_socket(self, family: int, kind: int, uid: str = "") -> socket.socket:
        """A socket in the node's network namespace, or in that of the pod `uid`; not blocking."""
        _, fds = await self._ask({"do": "socket", "family": family, "type": kind, "uid": uid})
        sock = socket.socket(fileno=fds[0])
        sock.setblocking(False)
        return sock

    async def exec(
        self, record: ContainerRecord, argv: Sequence[str], stdio: tuple[int, int, int], tty: bool = False
    ) -> "Exec":
        """Start a process in a container on the three descriptors (which stay the caller's)."""
        # What came of it is known as soon as the answer is here: the process may end before we are resumed.
        message = {"do": "exec", "uid": record.uid, "cid": record.cid, "argv": list(argv), "tty": tty}
        answer, _ = await self._ask(message, stdio)
        number = int(answer["exec"])
        return Exec(self, number, self._execs[number])

    async def kill_exec(self, number: int) -> None:
        with contextlib.suppress(RuntimeFailure):
            await self._ask({"do": "exec_kill", "exec": number})

    async def log_growth(self, record: ContainerRecord) -> AsyncIterator[None]:
        """Yields each time the container's log may have grown; ends never: look at the record to know whether it runs."""
        while True:
            grown = asyncio.get_running_loop().create_future()
            waiting = self._growth.setdefault(record.cid, [])
            waiting.append(grown)
            await self._ask({"do": "follow", "uid": record.uid, "cid": record.cid})
            yield
            await grown

    async def _ask(
        self, message: Message, fds: Sequence[int] = (), reason: str = "RunContainerError"
    ) -> tuple[Message, list[int]]:
        if self._packets is None:
            raise RuntimeFailure("the pod runtime is not connected to its shim", reason)
        self._number += 1
        number = self._number
        future: asyncio.Future[tuple[Message, list[int]]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self._packets.send({**message, "id": number}, fds)
            answer, received = await future
        except ValueError as error:
            raise RuntimeFailure(str(error), reason) from error
        finally:
            self._answers.pop(number, None)
        if "error" in answer:
            raise RuntimeFailure(str(answer["error"]), reason)
        return answer["ok"], received

    def _on_packet(self, message: Message, fds: list[int]) -> None:
        number = message.get("id")
        if number is not None:
            future = self._answers.get(number)
            started = message.get("ok", {}).get("exec")
            if started is not None:
                self._execs[started] = asyncio.get_running_loop().create_future()
                if future is None:
                    self._abandon(started)
            if future is not None and not future.done():
                future.set_result((message, fds))
            else:  # asked by a task that was cancelled since
                for fd in fds:
                    os.close(fd)
            return
        match message["event"]:
            case "container" if self._greeting:
                self._records.append(ContainerRecord(**message["container"]))
            case "container":
                self._on_container(ContainerRecord(**message["container"]))
            case "sandbox":
                self._found.append((SandboxSpec(**message["sandbox"]), int(message["pid"])))
            case "sandbox_gone":
                self._on_gone(message["uid"])
            case "exec_exit":
                code = self._execs.get(message["exec"])
                if code is not None:
                    code.set_result(int(message["code"]))
            case "log":
                for grown in self._growth.pop(message["cid"], []):
                    if not grown.done():
                        grown.set_result(None)

    def forget_exec(self, number: int) -> None:
        """Drop what is kept for an exec whose exit code nobody awaits any more."""
        self._execs.pop(number, None)

    def _abandon(self, number: int) -> None:
        """Kill what was started for somebody who has gone since."""
        self.forget_exec(number)
        if self._packets is not None:
            self._packets.send({"id": 0, "do": "exec_kill", "exec": number})

    def _shim_ended(self) -> None:
        self._let_go()
        self._on_lost()

    def _let_go(self) -> None:
        lost = RuntimeFailure("the pod runtime's shim has ended")
        self._packets = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(lost)
        for code in self._execs.values():
            if not code.done():
                code.cancel()
        for waiting in self._growth.values():
            for grown in waiting:
                if not grown.done():
                    grown.cancel()
        self._growth.clear()


class Exec:
    """A process started in a container beside its main one."""

    def __init__(self, client: ShimClient, number: int, code: asyncio.Future[int]) -> None:
        self._client, self._number, self._code = client, number, code

    async def wait(self) -> int:
        """Its exit code (128 + signal if killed)."""
        try:
            return await asyncio.shield(self._code)
        finally:
            if self._code.done():
                self._client.forget_exec(self._number)

    async def kill(self) -> None:
        """Its exit code still comes to who waits for it."""
        await self._client.kill_exec(self._number)
