"""An interactive exec session: Kubernetes' WebSocket channels on one side, a process's pipes or terminal on the other.

The protocols are `v4.channel.k8s.io` and `v5.channel.k8s.io`: binary messages, the first byte names the channel. Version 5
adds channel 255, which closes the channel named in the next byte (k8s.io/apimachinery/pkg/util/remotecommand).
"""

import asyncio
import contextlib
import fcntl
import json
import os
import struct
import termios
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import WSMsgType, web

from podwire.model.meta import Json
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.shim.messages import ContainerRecord
from podwire.runtime.shimclient import ShimClient

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255

_READ = 32768


@dataclass(frozen=True, slots=True)
class ExecOptions:
    """corev1.PodExecOptions."""

    command: tuple[str, ...]
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False


class ExecSession:
    """Runs one command for one WebSocket."""

    def __init__(
        self, client: ShimClient, record: ContainerRecord, socket: web.WebSocketResponse, options: ExecOptions
    ) -> None:
        self._client, self._record, self._socket, self._options = client, record, socket, options
        self._stdin: asyncio.StreamWriter | None = None
        self._terminal = -1
        self._opened: list[int] = []

    async def run(self) -> None:
        """Until the process ends (then its status is sent) or the client goes (then it is killed)."""
        outputs: list[tuple[int, asyncio.StreamReader, asyncio.ReadTransport]] = []
        try:
            process_fds = await self._plumb(outputs)
            process = await self._client.exec(self._record, self._options.command, process_fds, self._options.tty)
        except RuntimeFailure as error:
            await self._finish(failure(f"error executing command in container: {error}", "InternalError", 500))
            return
        finally:
            self._close_opened()
        # Tells the client that the process runs (as kubelet does).
        await self._send(STDOUT if self._options.stdout else ERROR if not self._options.stderr else STDERR, b"")
        incoming = asyncio.create_task(self._take_input())
        pumps = asyncio.gather(*(self._pump(channel, reader) for channel, reader, _ in outputs))
        ending = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({incoming, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():  # the client went away
                await process.kill()
            code = await ending
            await pumps
            await self._finish(SUCCESS if code == 0 else exit_failure(code))
        finally:
            for task in (incoming, pumps, ending):
                task.cancel()
            for _, _, transport in outputs:
                transport.close()
            if self._stdin is not None:
                self._stdin.close()
            if self._terminal >= 0:
                os.close(self._terminal)
            if not ending.done():
                with contextlib.suppress(RuntimeFailure):
                    await process.kill()

    # --- descriptors ----------------------------------------------------------------------------------------------

    async def _plumb(self, outputs: list[tuple[int, asyncio.StreamReader, asyncio.ReadTransport]]) -> tuple[int, int, int]:
        """Make the process's three descriptors (closed by `_close_opened`) and connect our ends of them."""
        if self._options.tty:
            master, slave = os.openpty()
            os.set_inheritable(master, False)
            self._terminal = master
            self._opened.append(slave)
            await self._connect_output(STDOUT, os.dup(master), outputs)
            await self._connect_stdin(os.dup(master))
            return slave, slave, slave
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._opened.append(null)
        fds = [null, null, null]
        if self._options.stdin:
            fds[0], writing = os.pipe2(os.O_CLOEXEC)
            self._opened.append(fds[0])
            await self._connect_stdin(writing)
        for channel, wanted in ((STDOUT, self._options.stdout), (STDERR, self._options.stderr)):
            if wanted:
                reading, fds[channel] = os.pipe2(os.O_CLOEXEC)
                self._opened.append(fds[channel])
                await self._connect_output(channel, reading, outputs)
        return fds[0], fds[1], fds[2]

    async def _connect_output(
        self, channel: int, fd: int, outputs: list[tuple[int, asyncio.StreamReader, asyncio.ReadTransport]]
    ) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
        )
        outputs.append((channel, reader, transport))

    async def _connect_stdin(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(fd, "wb", 0))
        self._stdin = asyncio.StreamWriter(transport, protocol, None, loop)

    def _close_opened(self) -> None:
        for fd in self._opened:
            os.close(fd)
        self._opened.clear()

    # --- data -----------------------------------------------------------------------------------------------------

    async def _pump(self, channel: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):  # a terminal's end shows as EIO
            while data := await reader.read(_READ):
                await self._send(channel, data)

    async def _take_input(self) -> None:
        """Handle what the client sends, until it goes."""
        async for message in self._socket:
            if message.type is not WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel == STDIN and self._stdin is not None:
                with contextlib.suppress(OSError):  # the process may have closed its stdin
                    self._stdin.write(data)
                    await self._stdin.drain()
            elif channel == CLOSE and data[:1] == bytes([STDIN]):
                self._end_stdin()
            elif channel == RESIZE and self._terminal >= 0:
                self._resize(data)

    def _end_stdin(self) -> None:
        if self._stdin is None or self._options.tty:
            return  # a terminal's end of input is a character (^D), which the client sends
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _resize(self, data: bytes) -> None:
        with contextlib.suppress(ValueError, OSError, struct.error, AttributeError):
            size = json.loads(data)
            rows, columns = int(size.get("Height", 24)), int(size.get("Width", 80))
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def _send(self, channel: int, data: bytes) -> None:
        if not self._socket.closed:
            with contextlib.suppress(ConnectionError):
                await self._socket.send_bytes(bytes([channel]) + data)

    async def _finish(self, status: Json) -> None:
        await self._send(ERROR, json.dumps(status).encode())
        await self._socket.close()


SUCCESS: Json = {"metadata": {}, "status": "Success"}


def failure(message: str, reason: str, code: int, causes: Sequence[Json] = ()) -> Json:
    """A metav1.Status that tells of a failure."""
    status: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    status |= {"reason": reason, "code": code}
    return {**status, "details": {"causes": list(causes)}} if causes else status


def exit_failure(code: int) -> Json:
    """The status of a command that ended with `code`, in the words that clients look for."""
    message = f"command terminated with non-zero exit code: exit status {code}"
    return failure(message, "NonZeroExitCode", 500, [{"reason": "ExitCode", "message": str(code)}])
