"""The shim's server: requests from the nodes' runtimes in, sandboxes and containers made, exits and log growth told."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from podwire.runtime.shim.logfile import LogFile, LogPipe
from podwire.runtime.shim.messages import ContainerRecord, ContainerSpec, Message, SandboxSpec, fields_of
from podwire.runtime.shim.packets import PacketSocket
from podwire.runtime.shim.sandbox import Container, PodSandbox, spawn_container, spawn_exec, spawn_pause
from podwire.runtime.shim.spawn import Home, SpawnFailed
from podwire.runtime.shim.standin import Identity, StandIn, open_sockets

_log = logging.getLogger(__name__)

Handler = Callable[["_Client", Message, list[int]], "Message | asyncio.Future[Message]"]


class _Client:
    """A connected runtime: one node's."""

    def __init__(self, shim: "Shim", sock: socket.socket) -> None:
        self.node = ""
        self.net = -1
        self.following: set[str] = set()
        self.told: set[str] = set()  # followed logs of which growth was told and not yet asked about again
        self.execs: dict[int, int] = {}  # exec id → pidfd
        self._shim = shim
        self.packets = PacketSocket(sock, self._on_packet, self._on_close)

    def _on_packet(self, message: Message, fds: list[int]) -> None:
        self._shim.handle(self, message, fds)

    def _on_close(self) -> None:
        self._shim.forget(self)


class Shim:
    """All pods of all nodes that this process holds."""

    def __init__(self, pause_program: str) -> None:
        self._pause = pause_program
        self._home = Home()
        self._pods: dict[str, PodSandbox] = {}
        self._clients: set[_Client] = set()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_exec = 1
        self._handlers: dict[str, Handler] = {
            "who": lambda client, message, fds: {"pid": os.getpid()},
            "hello": self._hello,
            "sandbox": self._sandbox,
            "run": self._run,
            "kill": self._kill,
            "forget": self._forget,
            "note": self._note,
            "remove": self._remove,
            "exec": self._exec,
            "exec_kill": self._exec_kill,
            "socket": self._socket,
            "follow": self._follow,
        }

    def accept(self, listener: socket.socket) -> None:
        """Take a waiting connection on `listener`."""
        with contextlib.suppress(BlockingIOError):
            sock, _ = listener.accept()
            self._clients.add(_Client(self, sock))

    def forget(self, client: "_Client") -> None:
        """A runtime went away: its pods stay, its exec sessions do not."""
        self._clients.discard(client)
        for pidfd in client.execs.values():
            _send_signal(pidfd, signal.SIGKILL)
        if client.net >= 0:
            os.close(client.net)

    def handle(self, client: "_Client", message: Message, fds: list[int]) -> None:
        """Answer one request; an error is the request's, never the shim's."""
        number = int(message["id"])
        try:
            answer = self._handlers[message["do"]](client, message, fds)
        except (SpawnFailed, OSError, KeyError, ValueError, TypeError) as error:
            client.packets.send(_refusal(number, error))
        else:
            if isinstance(answer, asyncio.Future):
                answer.add_done_callback(lambda done: self._answer_later(client, number, done))
            elif answer.get("sent") is not True:
                client.packets.send({"id": number, "ok": answer})
        finally:
            for fd in fds:
                os.close(fd)

    def _answer_later(self, client: "_Client", number: int, done: "asyncio.Future[Message]") -> None:
        error = done.exception()
        client.packets.send(_refusal(number, error) if error else {"id": number, "ok": done.result()})

    # --- verbs ----------------------------------------------------------------------------------------------------

    def _hello(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        client.node, client.net = str(message["node"]), os.dup(fds[0])
        for pod in self._pods.values():
            if pod.node != client.node:
                continue
            client.packets.send({"event": "sandbox", "sandbox": fields_of(pod.spec), "pid": pod.pid})
            for container in pod.containers.values():
                client.packets.send({"event": "container", "container": fields_of(container.record)})
        return {}

    def _sandbox(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        spec = SandboxSpec(**message["sandbox"])
        pod = self._pods.get(spec.uid)
        if pod is None:
            pid = spawn_pause(spec, self._pause, client.net)
            pod = PodSandbox(spec, client.node, pid, os.pidfd_open(pid))
            self._pods[spec.uid] = pod
            self._loop.add_reader(pod.pidfd, self._pause_ended, pod)
        return {"pid": pod.pid}

    def _run(self, client: "_Client", message: Message, fds: list[int]) -> "Message | asyncio.Future[Message]":
        spec = ContainerSpec.from_message(message["container"])
        pod = self._pods[spec.uid]
        log = LogFile(spec.log, lambda: self._log_grew(spec.cid))
        record = ContainerRecord(
            uid=spec.uid,
            cid=spec.cid,
            name=spec.name,
            attempt=spec.attempt,
            log=spec.log,
            stand_in=not spec.argv,
            pid=pod.pid,
            started_at=time.time(),
            note=spec.note,
        )
        container = Container(spec, record, log)
        if not spec.argv:
            return asyncio.ensure_future(self._run_stand_in(pod, container, self._stand_in_sockets(pod, spec)))
        try:
            self._run_process(pod, container)
        except BaseException:
            log.close()
            raise
        pod.containers[spec.cid] = container
        return self._started(pod, container)

    def _started(self, pod: PodSandbox, container: Container) -> Message:
        fields = fields_of(container.record)
        self._tell(pod.node, {"event": "container", "container": fields})
        return {"container": fields}

    def _stand_in_sockets(self, pod: PodSandbox, spec: ContainerSpec) -> list[socket.socket]:
        with self._home.network(pod.pidfd):
            return open_sockets(spec.ports)

    async def _run_stand_in(self, pod: PodSandbox, container: Container, sockets: list[socket.socket]) -> Message:
        spec = container.spec
        identity = Identity(pod.spec.name, pod.spec.namespace, spec.node, spec.name)
        container.stand_in = StandIn(identity, lambda line: container.log.write("stdout", [line.encode()]))
        pod.containers[spec.cid] = container
        await container.stand_in.serve(sockets)
        served = ", ".join(f"{port.port}/{port.protocol}" for port in spec.ports) or "no port"
        purpose = "nothing to do" if spec.completes else f"serving {served}"
        container.log.write("stdout", [f"stand-in for {pod.spec.namespace}/{pod.spec.name}, {purpose}".encode()])
        if spec.completes:
            self._loop.call_soon(self._ended, container, 0, 0)
        return self._started(pod, container)

    def _run_process(self, pod: PodSandbox, container: Container) -> None:
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        try:
            pid = spawn_container(pod, container.spec, (out_write, err_write))
        except BaseException:
            os.close(out_read)
            os.close(err_read)
            raise
        finally:
            os.close(out_write)
            os.close(err_write)
        container.record = replace(container.record, pid=pid)
        container.pidfd = os.pidfd_open(pid)
        container.pipes = (LogPipe(out_read, "stdout", container.log), LogPipe(err_read, "stderr", container.log))
        self._loop.add_reader(container.pidfd, self._process_ended, pod, container)

    def _kill(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        container = self._container(message)
        number = int(message["signal"])
        if container.stand_in is not None and container.record.running:
            if number == signal.SIGTERM:
                container.stand_in.drain(lambda: self._ended(container, 0, 0))
            else:
                self._ended(container, 128 + number, number)
        elif container.pidfd >= 0:
            _send_signal(container.pidfd, number)
        return {}

    def _forget(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        container = self._container(message)
        if not container.record.running:
            self._pods[message["uid"]].containers.pop(container.spec.cid, None)
        return {}

    def _note(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        container = self._container(message)
        container.record = replace(container.record, note=str(message["note"]))
        return {}

    def _remove(self, client: "_Client", message: Message, fds: list[int]) -> "Message | asyncio.Future[Message]":
        pod = self._pods.pop(message["uid"], None)
        return {} if pod is None else asyncio.ensure_future(self._end_pod(pod))

    async def _end_pod(self, pod: PodSandbox) -> Message:
        """Kill everything in the pod and wait for it, so that no process outlives the answer."""
        for container in pod.containers.values():
            if container.stand_in is not None and container.record.running:
                self._ended(container, 128 + signal.SIGKILL, signal.SIGKILL)
            elif container.pidfd >= 0:
                _send_signal(container.pidfd, signal.SIGKILL)
        _send_signal(pod.pidfd, signal.SIGKILL)
        for container in pod.containers.values():
            if container.pidfd >= 0:
                self._loop.remove_reader(container.pidfd)
                await self._gone(container.pidfd)
                self._process_ended(pod, container)
        self._loop.remove_reader(pod.pidfd)
        await self._gone(pod.pidfd)
        _wait(pod.pid)
        os.close(pod.pidfd)
        return {}

    async def _gone(self, pidfd: int) -> None:
        gone = asyncio.Event()
        self._loop.add_reader(pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            self._loop.remove_reader(pidfd)

    def _exec(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        container = self._container(message)
        if not container.record.running:
            raise ValueError(f"container {container.spec.name} is not running")
        pod = self._pods[message["uid"]]
        argv = tuple(str(word) for word in message["argv"])
        pid = spawn_exec(pod, container, argv, (fds[0], fds[1], fds[2]), bool(message["tty"]))
        number, self._next_exec = self._next_exec, self._next_exec + 1
        pidfd = os.pidfd_open(pid)
        client.execs[number] = pidfd
        self._loop.add_reader(pidfd, self._exec_ended, client, number, pid, pidfd)
        return {"exec": number}

    def _exec_ended(self, client: "_Client", number: int, pid: int, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        client.execs.pop(number, None)
        code, _ = _wait(pid)
        client.packets.send({"event": "exec_exit", "exec": number, "code": code})

    def _exec_kill(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        pidfd = client.execs.get(int(message["exec"]))
        if pidfd is not None:
            _send_signal(pidfd, signal.SIGKILL)
        return {}

    def _socket(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        """A socket in the node's network namespace, or with `uid` in that pod's."""
        uid = message.get("uid")
        with self._home.network(self._pods[uid].pidfd if uid else client.net):
            sock = socket.socket(int(message["family"]), int(message["type"]))
        client.packets.send({"id": message["id"], "ok": {}}, [sock.fileno()])
        sock.close()
        return {"sent": True}

    def _follow(self, client: "_Client", message: Message, fds: list[int]) -> Message:
        """One `log` event when the container's log grows next, or at once if it has ended; `on` false: no more."""
        cid = str(message["cid"])
        if not message.get("on", True):
            client.following.discard(cid)
        elif self._find(message) is None or not self._container(message).record.running:
            client.packets.send({"event": "log", "cid": cid})
        else:
            client.following.add(cid)
        return {}

    # --- what happens ---------------------------------------------------------------------------------------------

    def _log_grew(self, cid: str) -> None:
        for client in self._clients:
            if cid in client.following:
                client.following.discard(cid)
                client.packets.send({"event": "log", "cid": cid})

    def _process_ended(self, pod: PodSandbox, container: Container) -> None:
        if container.pidfd < 0:
            return
        self._loop.remove_reader(container.pidfd)
        os.close(container.pidfd)
        container.pidfd = -1
        code, number = _wait(container.record.pid)
        for pipe in container.pipes:
            pipe.finish()
        self._ended(container, code, number)

    def _ended(self, container: Container, code: int, number: int) -> None:
        if not container.record.running:
            return
        if container.stand_in is not None:
            container.stand_in.close()
        container.log.close()
        container.record = replace(container.record, finished_at=time.time(), exit_code=code, signal=number)
        self._log_grew(container.spec.cid)
        pod = self._pods.get(container.spec.uid)
        self._tell(pod.node if pod else container.spec.node, {"event": "container", "container": fields_of(container.record)})

    def _pause_ended(self, pod: PodSandbox) -> None:
        """Someone killed the pause process: the pod is over."""
        self._loop.remove_reader(pod.pidfd)
        if self._pods.pop(pod.spec.uid, None) is None:
            return
        self._tell(pod.node, {"event": "sandbox_gone", "uid": pod.spec.uid})
        task = self._loop.create_task(self._bury(pod))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bury(self, pod: PodSandbox) -> None:
        await self._end_pod(pod)

    def _tell(self, node: str, event: Message) -> None:
        for client in tuple(self._clients):
            if client.node == node:
                client.packets.send(event)

    def _find(self, message: Message) -> Container | None:
        pod = self._pods.get(message["uid"])
        return pod.containers.get(message["cid"]) if pod else None

    def _container(self, message: Message) -> Container:
        container = self._find(message)
        if container is None:
            raise ValueError(f"there is no container {message['cid'][:12]} in pod {message['uid']}")
        return container


def _refusal(number: int, error: BaseException) -> Message:
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return {"id": number, "error": text}


def _wait(pid: int) -> tuple[int, int]:
    """Reap; the exit code as a shell has it, and the signal or 0."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return (128 - code, -code) if code < 0 else (code, 0)


def _send_signal(pidfd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


async def serve(listener: socket.socket, pause_program: str, stop: asyncio.Event) -> None:
    """Serve on `listener` until `stop` is set."""
    shim = Shim(pause_program)
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_report)
    loop.add_reader(listener, shim.accept, listener)
    await stop.wait()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.error("%s", context.get("message"), exc_info=context.get("exception"))
