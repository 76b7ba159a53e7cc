"""A start-up storm: 500 nodes at one etcd at the same moment, with podwire's subnet manager and with flannel's sequence of
requests. Part of `python -m bench overlay`."""

import asyncio
import ipaddress
import json
import os
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import Protocol

from bench.report import Figures, percentiles, say, table
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.registry import DEFAULT_PREFIX
from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    EtcdKeyValue,
    LeaseResponse,
    Operation,
    PutKey,
    RangeResponse,
    ReadKeys,
    TxnResponse,
    WatchResponse,
)
from podwire.plan.leases import LeaseAttrs, encode_attrs

NODES = 500
_SUBNETS = f"{DEFAULT_PREFIX}/subnets/"
_NETWORK = ipaddress.IPv4Network("10.0.0.0/8")
_TTL = 86400
_FIRST_FREE = 100
"""flannel takes one at random of so many free subnets."""
_RESTART_SECONDS = 1.0
"""flannel ends when somebody else was faster; so soon a supervisor starts it again."""
_DEADLINE = 60.0


class Node(Protocol):
    """One node of the storm. `subnet`: "" until it has one."""

    subnet: str
    races: int

    @abstractmethod
    async def run(self) -> None: ...

    @abstractmethod
    def known(self) -> int:
        """How many others it knows."""
        ...


async def storm(etcd: EtcdClient, etcd_pid: int) -> Figures:
    """`etcd`: of the one member, whose process is `etcd_pid`; the network's configuration is there."""
    figures: Figures = {"storm_nodes": NODES}
    for name in ("podwire", "flannel"):
        figures[f"storm_{name}"] = await _storm(name, etcd_pid)
        await etcd.txn([], [DeleteKeys(_SUBNETS, prefix=True)])
    ours, theirs = figures["storm_podwire"], figures["storm_flannel"]
    say(f"  {NODES} nodes start at once, one etcd member; all nodes of a kind in one process, by the same client:")
    rows = [["", "podwire", "flannel's sequence"]]
    for key, words in _ROWS.items():
        rows.append([words, *(_figure(figures[key]) for figures in (ours, theirs))])
    table(rows)
    return figures


_ROWS = {
    "all_hold_s": "until each has a subnet, s",
    "all_know_s": "until each knows all others, s",
    "requests": "requests a node, p50 / p99",
    "races": "lost races",
    "cpu_s": "CPU of all nodes, s",
    "etcd_cpu_s": "CPU of etcd, s",
}


def _figure(value: float | dict[str, float] | None) -> str:
    if isinstance(value, dict):
        return f"{value['p50']:.0f} / {value['p99']:.0f}"
    return f"not in {_DEADLINE:.0f}" if value is None else f"{value:.1f}"


async def _storm(kind: str, etcd_pid: int) -> Figures:
    clients = [EtcdClient(["http://127.0.0.1:2379"], timeout=60.0) for _ in range(NODES)]
    counted = [Counted(client) for client in clients]
    nodes: list[Node] = [Podwire(etcd, at) if kind == "podwire" else Flannel(etcd, at) for at, etcd in enumerate(counted)]
    started, cpu, etcd_cpu = time.perf_counter(), time.process_time(), cpu_seconds(etcd_pid)
    tasks = [asyncio.create_task(node.run()) for node in nodes]
    hold = know = None
    try:
        async with asyncio.timeout(_DEADLINE):
            hold = await _until(lambda: all(node.subnet for node in nodes), tasks, started)
            know = await _until(lambda: all(node.known() == NODES - 1 for node in nodes), tasks, started)
    except TimeoutError:
        pass  # said as such
    finally:
        figures: Figures = {"cpu_s": time.process_time() - cpu, "etcd_cpu_s": cpu_seconds(etcd_pid) - etcd_cpu}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            await client.close()
    subnets = {node.subnet for node in nodes if node.subnet}
    assert len(subnets) == NODES or hold is None, "a subnet has two owners"
    requests = percentiles([float(etcd.requests) for etcd in counted])
    return figures | {
        "all_hold_s": hold, "all_know_s": know, "requests": requests, "races": float(sum(node.races for node in nodes))
    }  # fmt: skip


async def _until(condition: "Condition", tasks: Sequence[asyncio.Task[None]], started: float) -> float:
    while not condition():
        if failed := next((task for task in tasks if task.done()), None):
            failed.result()
        await asyncio.sleep(0.05)
    return time.perf_counter() - started


class Condition(Protocol):
    def __call__(self) -> bool: ...


def cpu_seconds(pid: int) -> float:
    """What a process has used until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Counted:
    """An etcd client that counts its requests."""

    def __init__(self, etcd: EtcdClient) -> None:
        self._etcd = etcd
        self.requests = 0

    async def get(self, key: str) -> EtcdKeyValue | None:
        self.requests += 1
        return await self._etcd.get(key)

    async def range(self, request: ReadKeys) -> RangeResponse:
        self.requests += 1
        return await self._etcd.range(request)

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse:
        self.requests += 1
        return await self._etcd.txn(compare, success, failure)

    async def grant(self, ttl: int) -> LeaseResponse:
        self.requests += 1
        return await self._etcd.grant(ttl)

    async def keep_alive(self, lease: int) -> int:
        self.requests += 1
        return await self._etcd.keep_alive(lease)

    async def revoke(self, lease: int) -> None:
        self.requests += 1
        await self._etcd.revoke(lease)

    def watch(
        self, key: str, *, prefix: bool = False, start_revision: int = 0, prev_kv: bool = False
    ) -> AsyncGenerator[WatchResponse, None]:
        self.requests += 1
        return self._etcd.watch(key, prefix=prefix, start_revision=start_revision, prev_kv=prev_kv)


def _attrs(number: int) -> LeaseAttrs:
    mac = f"0a:60:00:00:{number >> 8:02x}:{number & 255:02x}"
    data = json.dumps({"VNI": 1, "VtepMAC": mac}, separators=(",", ":"))
    address = ipaddress.IPv4Address("198.19.0.0") + number
    return LeaseAttrs(public_ip=address, backend_type="vxlan", backend_data=data)


class Podwire(Node):
    """Our subnet manager, used as `podwire agent` does."""

    def __init__(self, etcd: Counted, number: int) -> None:
        self._manager, self._number = EtcdSubnets(etcd, rng=Random(number)), number
        self.subnet = ""

    @property
    def races(self) -> int:  # type: ignore[override]
        return self._manager.counters.races

    async def run(self) -> None:
        await self._manager.network_config()
        lease = await self._manager.acquire(_attrs(self._number))
        self.subnet = lease.node
        async with asyncio.TaskGroup() as group:
            group.create_task(self._manager.run())
            await self._manager.next_config()

    def known(self) -> int:
        return len(self._manager.peers)


class Flannel(Node):
    """What flannel 0.28 asks of etcd, in its order: the configuration (twice), the leases, a lease and the write, the leases
    again and a watch for them, its own key and a watch for that."""

    def __init__(self, etcd: Counted, number: int) -> None:
        self._etcd, self._number, self._rng = etcd, number, Random(number)
        self.subnet = ""
        self.races = 0
        self._peers: set[str] = set()

    async def run(self) -> None:
        while not await self._acquire():
            self.races += 1
            await asyncio.sleep(_RESTART_SECONDS)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_own())
            await self._follow()

    def known(self) -> int:
        return len(self._peers - {self.subnet})

    async def _acquire(self) -> bool:
        await self._etcd.get(f"{DEFAULT_PREFIX}/config")
        await self._etcd.get(f"{DEFAULT_PREFIX}/config")
        taken = {kv.key for kv in (await self._etcd.range(ReadKeys(key=_SUBNETS, prefix=True))).kvs}
        free: list[str] = []
        for index in range(1, 1 << 16):
            name = f"{_NETWORK.network_address + (index << 8)}-24"
            if _SUBNETS + name not in taken:
                free.append(name)
            if len(free) == _FIRST_FREE:
                break
        key = _SUBNETS + self._rng.choice(free)
        granted = await self._etcd.grant(_TTL)
        done = await self._etcd.txn([Compare(key, "VERSION", 0)], [PutKey(key, encode_attrs(_attrs(self._number)), granted.id)])
        if not done.succeeded:
            await self._etcd.revoke(granted.id)
            return False
        self.subnet = key
        return True

    async def _follow(self) -> None:
        page = await self._etcd.range(ReadKeys(key=_SUBNETS, prefix=True))
        self._peers = {kv.key for kv in page.kvs}
        async with aclosing(self._etcd.watch(_SUBNETS, prefix=True, start_revision=page.header.revision + 1)) as changes:
            async for change in changes:
                self._peers |= {event.kv.key for event in change.events}

    async def _follow_own(self) -> None:
        page = await self._etcd.range(ReadKeys(key=self.subnet))
        async with aclosing(self._etcd.watch(self.subnet, start_revision=page.header.revision + 1)) as changes:
            async for _ in changes:
                pass
