"""etcd in a lab: real processes (Debian's package etcd-server), each in a place of its own on the fabric."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import EtcdError
from podwire.kernel.netns import run_in_netns
from podwire.lab.errors import LabError
from podwire.lab.topology import Place

log = logging.getLogger(__name__)

CLIENT_PORT, PEER_PORT = 2379, 2380
_READY_SECONDS = 20.0
_AGAIN_SECONDS = 1.0


def find_etcd() -> str:
    """The program. Raises LabError that says how to get it."""
    program = shutil.which("etcd")
    if program is None:
        raise LabError("a lab with --subnet-manager etcd needs etcd: install it (Debian: apt-get install etcd-server)")
    return program


def client_url(place: Place) -> str:
    return _url(place, CLIENT_PORT)


def _url(place: Place, port: int) -> str:
    address = next(iter(place.addresses.values()))
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


class EtcdMember:
    """A machine with an etcd member on it: it can be stopped as by `kill -9`, and goes on with its data when started again.

    `netns`: the place's namespace (ours to use, not to close). `members`: all places with members, this one included."""

    loses_cable = False

    def __init__(self, place: Place, netns: int, folder: Path, members: Sequence[Place]) -> None:
        self.place = place
        self._netns, self._folder = netns, folder / place.name
        self._members = tuple(members)
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Run the member, and again if it ends by itself. Raises LabError. Blocks some milliseconds."""
        if self._process is not None:
            return
        program = find_etcd()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / "log").open("ab") as output:
            self._process = run_in_netns(
                self._netns,
                lambda: subprocess.Popen(
                    [program, *self._arguments()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={"PATH": os.defpath, "HOME": str(self._folder)},
                    cwd="/",
                ),
            )
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    async def stop(self) -> None:
        """Kill it; its data stay."""
        process = self._forget()
        if process is not None:
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)

    def _ended(self) -> None:
        process = self._forget()
        if process is None:
            return
        status = process.wait()
        log.error("%s ended by itself (status %d) and is started again; its log: %s", self.place.name, status, self.log_tail())
        asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self.start)

    def _forget(self) -> subprocess.Popen[bytes] | None:
        process, self._process = self._process, None
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        return process

    def log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / "log").read_text(errors="replace")[-500:]
        return ""

    def _arguments(self) -> list[str]:
        options: Mapping[str, str] = {
            "name": self.place.name,
            "data-dir": str(self._folder / "data"),
            "listen-client-urls": client_url(self.place),
            "advertise-client-urls": client_url(self.place),
            "listen-peer-urls": _url(self.place, PEER_PORT),
            "initial-advertise-peer-urls": _url(self.place, PEER_PORT),
            "initial-cluster": ",".join(f"{place.name}={_url(place, PEER_PORT)}" for place in self._members),
            "initial-cluster-state": "new",
            "log-level": "warn",
        }
        return [f"--{name}={value}" for name, value in options.items()]


async def write_config(members: Sequence[EtcdMember], key: str, config: str) -> None:
    """Wait until the members answer, and put the network's configuration where agents look for it. Raises LabError."""
    async with EtcdClient([client_url(member.place) for member in members]) as etcd:
        problem = "no answer"
        try:
            async with asyncio.timeout(_READY_SECONDS):
                while True:
                    try:
                        await etcd.put(key, config.encode())
                    except EtcdError as error:
                        problem = str(error)
                        await asyncio.sleep(0.05)
                    else:
                        return
        except TimeoutError:
            raise LabError(f"etcd is not ready after {_READY_SECONDS:g} s: {problem}; {members[0].log_tail()}") from None
