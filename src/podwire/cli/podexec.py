"""A command in a pod through the exec API, as kubectl does it: a WebSocket with numbered channels."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import termios
import threading
import tty as tty_module
from collections.abc import Iterator, Sequence

import aiohttp

from podwire.client.api import ApiClient
from podwire.lab.targets import PodTarget
from podwire.model.errors import PodwireError
from podwire.model.resources import PODS

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255
_CHUNK = 32768


async def run_in_pod(client: ApiClient, target: PodTarget, command: Sequence[str], tty: bool | None = None) -> int:
    """Run `command` in the pod with this process' stdin, stdout and stderr; returns its exit status. Raises ApiError."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    tty = terminal if tty is None else tty
    params = [("command", part) for part in command]
    params += [("stdin", "true"), ("stdout", "true"), ("stderr", "false" if tty else "true"), ("tty", str(tty).lower())]
    params.append(("container", target.container))
    path = PODS.path(target.namespace, target.name, "exec")
    ws = await client.websocket(path, params=params, protocols=PROTOCOLS)
    try:
        with _raw_terminal() if tty and sys.stdin.isatty() else contextlib.nullcontext():
            return await _converse(ws, tty)
    finally:
        await ws.close()


async def _converse(ws: aiohttp.ClientWebSocketResponse, tty: bool) -> int:
    sender = asyncio.create_task(_send_stdin(ws))
    resizer = asyncio.create_task(_send_size(ws)) if tty else None
    try:
        async for message in ws:
            if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel in (_STDOUT, _STDERR):
                _write(channel, data)
            elif channel == _ERROR:
                return exit_status(data)
        raise PodwireError("the connection to the pod ended before the command did")
    finally:
        for task in (sender, resizer):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await task


def exit_status(document: bytes) -> int:
    """The metav1.Status at the end of an exec → the command's exit status. Raises PodwireError when it never ran."""
    status = json.loads(document)
    if status.get("status") == "Success":
        return 0
    for cause in (status.get("details") or {}).get("causes") or ():
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    raise PodwireError(str(status.get("message") or "the command could not be run"))


async def _send_stdin(ws: aiohttp.ClientWebSocketResponse) -> None:
    queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=16)
    loop = asyncio.get_running_loop()

    def read() -> None:
        # A thread, since a file cannot be awaited. It may sit in read() when the command ends: a daemon may be left there.
        with contextlib.suppress(RuntimeError, OSError):  # the loop is closed, the terminal is gone
            while data := os.read(0, _CHUNK):
                asyncio.run_coroutine_threadsafe(queue.put(data), loop).result()
            asyncio.run_coroutine_threadsafe(queue.put(b""), loop).result()

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while data := await queue.get():
        await ws.send_bytes(bytes([_STDIN]) + data)
    if ws.protocol == PROTOCOLS[0]:  # older ones cannot say that stdin has ended
        await ws.send_bytes(bytes([_CLOSE, _STDIN]))


async def _send_size(ws: aiohttp.ClientWebSocketResponse) -> None:
    changed = asyncio.Event()
    changed.set()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        while True:
            await changed.wait()
            changed.clear()
            with contextlib.suppress(OSError):
                size = os.get_terminal_size(sys.stdout.fileno())
                document = json.dumps({"Width": size.columns, "Height": size.lines})
                await ws.send_bytes(bytes([_RESIZE]) + document.encode())
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


def _write(channel: int, data: bytes) -> None:
    stream = sys.stdout.buffer if channel == _STDOUT else sys.stderr.buffer
    stream.write(data)
    stream.flush()


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the pod, ^C too, until the command ends."""
    saved = termios.tcgetattr(0)
    tty_module.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
