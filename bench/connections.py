"""New connections through a ClusterIP, with 1 and with 10,000 Services programmed, in flat maps and in iptables.

One namespace: client, rules and server. The Service asked is the last one loaded: iptables searches KUBE-SERVICES from the top.
"""

import asyncio
import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator

import msgspec

from bench.report import Figures, main, say, table
from bench.serviceobjects import FACTS, Item, item
from bench.servicepeers import iptables_shape
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import enter_user_namespace
from podwire.model.kernelstate import Address, Device, Link, Route
from podwire.model.ops import AddAddress, ChangeLink, CommitNft, Op, SetRoute
from podwire.plan.services import ServicePlanner

SIZES = (1, 10_000)
CONNECTIONS = 2000
ROUNDS = 7
SERVER = "10.244.250.1"
PATIENCE_SECONDS = 180.0


def run() -> Figures:
    """{"flat_maps": {"1": …, "10000": …, "ratio": …}, "iptables": {…}, "direct": …}; connections for each second of the
    client's processor time, the middle round's.

    `ratio`: of 10,000 to 1. `direct`: to the server's own address, past no Service."""
    enter_user_namespace()
    asyncio.run(_prepare())
    figures: Figures = {}
    with _server():
        figures["direct"] = _rate(SERVER, 8080)
        figures["flat_maps"] = {str(size): _flat(size) for size in SIZES}
        if shutil.which("iptables-legacy-restore"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                figures["iptables"] = {str(size): _iptables(size) for size in SIZES}
    rows: list[list[object]] = [["new connections a CPU second", *map(str, SIZES), "ratio"]]
    for name in ("flat_maps", "iptables"):
        found = figures.get(name)
        if found:
            found["ratio"] = found[str(SIZES[-1])] / found[str(SIZES[0])]
            rows.append([name, *(found[str(size)] for size in SIZES), found["ratio"]])
    table(rows)
    say(f"  (without any Service: {figures['direct']:.0f}; aim: flat maps keep their rate, the ratio is 1 within noise)")
    return figures


async def _prepare() -> None:
    """The namespace's loopback: the server's address, and a way for ClusterIPs to be sent at all."""
    address, cluster_ips = ipaddress.ip_interface(f"{SERVER}/32"), ipaddress.ip_network("10.96.0.0/12")
    ops: tuple[Op, ...] = (
        ChangeLink(Link("lo", Device())),
        AddAddress(Address("lo", address)),
        SetRoute(Route(cluster_ips, "lo")),
    )
    await _apply(ops)


async def _apply(ops: tuple[Op, ...]) -> None:
    kernel = LinuxKernel()
    try:
        applied = await kernel.apply(ops)
        if applied.failures:
            raise RuntimeError(str(applied.failures[0]))
    finally:
        await kernel.close()


def _items(size: int) -> list[Item]:
    """All of them lead to the one server."""
    made = []
    for number in range(size):
        chosen = item(number)
        made.append(chosen)
    last = made[-1]
    endpoints = tuple(msgspec.structs.replace(e, addresses=(SERVER,)) for e in last.piece.endpoints)
    made[-1] = last._replace(piece=msgspec.structs.replace(last.piece, endpoints=endpoints))
    return made


def _flat(size: int) -> float:
    planner, items = ServicePlanner(FACTS), _items(size)
    for key, service, piece in items:
        planner.set_service(key, service, (piece,))
    asyncio.run(_apply((CommitNft(planner.take_batch()),)))
    try:
        return _rate(items[-1].service.spec.cluster_ip, 80)
    finally:
        subprocess.run(["nft", "delete", "table", "ip", "podwire"], check=True)
        subprocess.run(["nft", "delete", "table", "ip6", "podwire"], check=True)


def _iptables(size: int) -> float:
    items = _items(size)
    command = ["iptables-legacy-restore"]
    subprocess.run(command, input=iptables_shape(items), text=True, check=True, timeout=PATIENCE_SECONDS)
    try:
        return _rate(items[-1].service.spec.cluster_ip, 80)
    finally:
        subprocess.run(command, input="*nat\nCOMMIT\n", text=True, check=True)


def _rate(host: str, port: int) -> float:
    rates = []
    for _ in range(ROUNDS):
        # Time on a processor, not on the clock: rules are searched within the client's own system call, and what else the
        # machine does meanwhile must not count.
        started = time.process_time()
        for _ in range(CONNECTIONS):
            with socket.socket() as sock:
                # Ended by a reset: nothing is left in TIME_WAIT, and ports do not run out.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.connect((host, port))
        rates.append(CONNECTIONS / (time.process_time() - started))
    return statistics.median(rates)


@contextlib.contextmanager
def _server() -> Iterator[None]:
    """Accepts and closes, in a process of its own."""
    sock = socket.create_server((SERVER, 8080), backlog=4096)
    child = os.fork()
    if child == 0:
        while True:
            connection, _ = sock.accept()
            connection.close()
    sock.close()
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(run)
