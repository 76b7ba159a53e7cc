"""Starting a lab process and waiting until it reports. Runs in the caller's process, which stays as it is."""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from podwire.lab.boot import BootOrder
from podwire.lab.errors import LabError
from podwire.lab.spec import LabSpec
from podwire.lab.state import LabDirectory, LabRecord

_BASE_TIMEOUT = 30.0
_TIMEOUT_PER_NODE = 1.5


@dataclass(frozen=True, slots=True)
class Step:
    """A part of bringing a lab up that is done, and how long it took."""

    name: str
    seconds: float


@contextmanager
def held_leash() -> Iterator[int]:
    """A `leash` for `start_lab`: the lab ends when the block does, or when this process does, whatever it dies of."""
    read_end, write_end = os.pipe()  # the write end is nobody else's: no process is started with it
    try:
        yield read_end
    finally:
        os.close(read_end)
        os.close(write_end)


def start_lab(
    directory: LabDirectory,
    lock: int,
    spec: LabSpec,
    on_step: Callable[[Step], None] = lambda _: None,
    leash: int | None = None,
) -> LabRecord:
    """Bring a lab up and return when all its nodes are ready. Blocks; `on_step` is called as parts get done.

    `lock` is what `directory.create()` returned; it is closed here. `leash` is the read end of a pipe: the lab ends when
    no process holds the other end any more. Without one it lives on until it is taken down.

    Raises LabError; then nothing of the lab is left but its log."""
    read_end, write_end = os.pipe()
    try:
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
                _spawn(directory, BootOrder(spec, str(directory.path), listener.fileno(), lock, write_end, leash))
        finally:
            os.close(lock)
            os.close(write_end)
        _await_ready(read_end, _BASE_TIMEOUT + _TIMEOUT_PER_NODE * spec.nodes, on_step)
        return directory.live_record()
    except BaseException as error:
        if directory.alive and directory.record() is not None:
            directory.end(grace=1.0)
        if not isinstance(error, _Silence | LabError):
            raise
        words, log = directory.log_tail(3), directory.keep_log()
        if isinstance(error, LabError):
            raise LabError(f"{error}; the lab's log is {log}") from None
        raise LabError(f"the lab ended before it was ready ({error}); its log is {log} and ends with: {words}") from None
    finally:
        os.close(read_end)


class _Silence(Exception):
    """The lab process went away, or took too long, without a word."""


def _spawn(directory: LabDirectory, order: BootOrder) -> None:
    """Execute `podwire.lab.boot`, which ends once the lab process is there and its record is written."""
    with directory.log.open("ab") as log:
        boot = subprocess.Popen(
            [sys.executable, "-P", "-m", "podwire.lab.boot", order.to_argument()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            umask=0o077,
            pass_fds=order.descriptors,
            start_new_session=True,
        )
    try:
        boot.wait()
    except BaseException:  # interrupted: a lab process without a record ends by itself, one with it is ended by the caller
        boot.kill()
        boot.wait()
        raise


def _await_ready(read_end: int, timeout: float, on_step: Callable[[Step], None]) -> None:
    deadline = time.monotonic() + timeout
    buffer = b""
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([read_end], [], [], remaining)[0]:
            raise _Silence(f"nothing for {timeout:.0f} s")
        data = os.read(read_end, 65536)
        if not data:
            raise _Silence("it died")
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            document = json.loads(line)
            if "error" in document:
                raise LabError(document["error"])
            if "ready" in document:
                return
            on_step(Step(document["step"], document["seconds"]))
