"""The Unix socket on which the executed CNI plugin hands over what it was given (frames: `wire.cni`)."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from podwire.agent.attachments import Attachments
from podwire.agent.loopback import PLUGIN_TYPE as LOOPBACK
from podwire.agent.nodelock import AnotherAgent
from podwire.model.cni import CNI_VERSIONS, INVALID_ENVIRONMENT, TRY_LATER, CniError, CniRequest, CniResult
from podwire.model.meta import Json
from podwire.wire.cni import (
    decode_frame,
    encode_answer,
    parse_request,
    render_error,
    render_result,
    render_versions,
)

log = logging.getLogger(__name__)

DEFAULT_SOCKET = Path("/run/podwire/cni.sock")

COLLECT = "PODWIRE-COLLECT"
"""A verb of our own, for `podwire ipam gc`: free what belongs to containers that are no more."""

SPOOL_IT = 9
"""The exit status that tells the plugin to keep its DEL: the node's network is not up yet."""

INTERNAL = 999
_MAX_REQUEST = 4 << 20
_RECEIVE_SECONDS = 10.0


class CniServer:
    """Serves engines until cancelled. `listen` first: from then on no plugin finds nobody."""

    def __init__(self, path: Path, attachments: Attachments) -> None:
        self._path, self._attachments = path, attachments
        self._listener: socket.socket | None = None
        self._serving: set[asyncio.Task[None]] = set()

    def listen(self) -> None:
        """Raises AnotherAgent where someone serves the socket already, OSError where it cannot be made."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if _answers(self._path):
            raise AnotherAgent(f"another agent serves {self._path}: stop it first, or give this one another socket")
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        mask = os.umask(0o177)  # for its owner alone
        try:
            listener.bind(str(self._path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(mask)
        listener.listen(128)
        self._listener = listener

    async def run(self) -> None:
        """Accept until cancelled; what is being done then is given up, and its plugin told so by the end of its connection."""
        if self._listener is None:
            self.listen()
        loop = asyncio.get_running_loop()
        try:
            while self._listener is not None:
                # Not loop.sock_accept: cancelled at the wrong moment, it loses a connection.
                await _readable(self._listener)
                try:
                    connection, _ = self._listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                task = loop.create_task(self._serve(connection))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)
        finally:
            await self.close()

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        tasks = tuple(self._serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        fds: list[int] = []
        try:
            async with asyncio.timeout(_RECEIVE_SECONDS):
                frame = await _receive(connection, fds)
            answer = await self._answer(frame, fds[0] if fds else None)
            await loop.sock_sendall(connection, answer)
        except (OSError, TimeoutError) as error:
            log.info("a plugin did not wait for its answer: %s", error)
        except Exception:
            # A task boundary: one request must not take the agent with it.
            log.exception("a request of the CNI plugin failed")
        finally:
            connection.close()
            for fd in fds:
                os.close(fd)

    async def _answer(self, frame: bytes, netns: int | None) -> bytes:
        version = CNI_VERSIONS[-1]
        try:
            environment, config = decode_frame(frame)
            version = _version_of(config)
            own = await self._own_verb(environment.get("CNI_COMMAND", ""))
            if own is not None:
                return encode_answer(0, _dump(own))
            request = parse_request(environment, config)
            if request.type == LOOPBACK:
                document = _rendered(await self._attachments.loopback(request, netns), request)
            elif request.command == "DEL" and not self._attachments.ready:
                return encode_answer(SPOOL_IT, b"")
            else:
                document = await self._do(request, netns)
        except CniError as error:
            level = logging.INFO if error.code in (TRY_LATER, INVALID_ENVIRONMENT) else logging.WARNING
            log.log(level, "CNI: %s", error)
            return encode_answer(1, _dump(render_error(error, version)))
        except ValueError as error:
            return encode_answer(1, _dump(render_error(CniError(INVALID_ENVIRONMENT, str(error)), version)))
        except Exception as error:
            log.exception("a request of the CNI plugin failed")
            return encode_answer(1, _dump(render_error(CniError(INTERNAL, "the agent failed", repr(error)), version)))
        return encode_answer(0, _dump(document) if document is not None else b"")

    async def _do(self, request: CniRequest, netns: int | None) -> Json | None:
        attachments = self._attachments
        match request.command:
            case "ADD":
                return _rendered(await attachments.add(request, netns), request)
            case "DEL":
                await attachments.delete(request.key, netns)
            case "CHECK":
                await attachments.check(request, netns)
            case "GC":
                await attachments.collect(request.network, request.valid)
            case "STATUS":
                attachments.status()
            case "VERSION":
                return render_versions(request.version)
        return None

    async def _own_verb(self, verb: str) -> Json | None:
        if verb == COLLECT:
            await self._attachments.work_off()
            return {"freed": await self._attachments.sweep()}
        return None


def _rendered(result: CniResult | None, request: CniRequest) -> Json | None:
    """A plugin that is not the chain's first hands on what it was given."""
    if result is None:
        return None
    if request.previous_document is not None:
        return request.previous_document | {"cniVersion": request.version}
    return render_result(result, request.version)


async def _receive(connection: socket.socket, fds: list[int]) -> bytes:
    """The whole request; descriptors that came with it are added to `fds`, which the caller closes."""
    connection.setblocking(False)
    parts: list[bytes] = []
    size = 0
    while True:
        await _readable(connection)
        data, came, _, _ = socket.recv_fds(connection, 1 << 16, 4, socket.MSG_CMSG_CLOEXEC)
        fds += came
        if not data:
            return b"".join(parts)
        parts.append(data)
        size += len(data)
        if size > _MAX_REQUEST:
            raise OSError("a request of more than 4 MiB")


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _version_of(config: bytes) -> str:
    """The version that an error document shall have."""
    version: Any = None
    with contextlib.suppress(ValueError, AttributeError):
        version = json.loads(config).get("cniVersion")
    return version if version in CNI_VERSIONS else CNI_VERSIONS[-1]


def _dump(document: Json) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
