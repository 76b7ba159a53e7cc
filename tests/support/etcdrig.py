"""Debian's etcd for tests: members on loopback ports of their own, in a directory of their own, ended by pid."""

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import EtcdError
from podwire.kernel.syscalls import CLONE_NEWNET, setns

START_SECONDS = 20.0


def need_etcd() -> str:
    """The path of etcd, or a skip that names it."""
    path = shutil.which("etcd")
    if path is None:
        pytest.skip("etcd is not installed (Debian package etcd-server)")
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Member:
    """One etcd process. `start` again after `end` goes on with the same data. `netns`: a descriptor of the namespace that it
    runs in; without it that of the tests."""

    def __init__(
        self,
        folder: Path,
        name: str,
        client_url: str,
        peer_url: str,
        arguments: Sequence[str] = (),
        *,
        netns: int | None = None,
    ) -> None:
        self.name, self.client_url, self.peer_url = name, client_url, peer_url
        self.folder = folder / name
        self._arguments = tuple(arguments)
        self._netns = netns
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        program = need_etcd()
        into = self._netns
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        try:
            self._process = await asyncio.create_subprocess_exec(
                program, "--name", self.name, "--data-dir", str(self.folder / "data"),
                "--listen-client-urls", self.client_url, "--advertise-client-urls", self.client_url,
                "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
                "--unsafe-no-fsync", "--logger", "zap", "--log-level", "warn", *self._arguments,
                stdout=log, stderr=log, env={"PATH": os.defpath, "HOME": str(self.folder)},
                preexec_fn=None if into is None else lambda: setns(into, CLONE_NEWNET),
            )  # fmt: skip
        finally:
            os.close(log)

    async def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(how)
        await process.wait()

    def pause(self) -> None:
        """It neither answers nor notices that time passes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


async def answers(client: EtcdClient, within: float = START_SECONDS) -> None:
    """Wait until the cluster answers a linearizable read."""
    async with asyncio.timeout(within):
        while True:
            try:
                await client.get("nothing")
            except EtcdError:
                await asyncio.sleep(0.05)
            else:
                return


@asynccontextmanager
async def one_member(folder: Path, *arguments: str, scheme: str = "http", host: str = "127.0.0.1") -> AsyncIterator[Member]:
    """A cluster of one that serves at `host`, started; not yet waited for."""
    need_etcd()
    peer = f"http://127.0.0.1:{free_port()}"
    member = Member(
        folder,
        "solo",
        f"{scheme}://{host}:{free_port()}",
        peer,
        ("--initial-cluster", f"solo={peer}", *arguments),
    )
    await member.start()
    try:
        yield member
    finally:
        await member.end()
