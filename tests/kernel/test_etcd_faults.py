"""Real etcd of three members, each on a machine (a namespace) of its own beside a node: cables pulled, members killed.

All the time: no subnet has two holders. In the end: all hold one, know each other, and nothing is left over."""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from ipaddress import IPv4Address
from itertools import combinations
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from etcdrig import Member, answers, need_etcd

from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.port import Holding
from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import EtcdError, EtcdUnavailable
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.model.addr import IPNetwork
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Device, Link, Veth
from podwire.model.ops import AddAddress, AddLink, ChangeLink, Op
from podwire.plan.leases import LeaseAttrs, vxlan_data

pytestmark = [pytest.mark.kernel, pytest.mark.needs("bridge devices"), pytest.mark.timeout(120)]

PREFIX = "/coreos.com/network"
CONFIG = b'{"Network":"10.5.0.0/22","SubnetLen":24,"Backend":{"Type":"vxlan"}}'
"""Three subnets, for three machines."""
TTL = 3
COUNT = 3
TIMING = ("--heartbeat-interval", "50", "--election-timeout", "500", "--initial-cluster-state", "new")


class Machine:
    """A namespace on a cable, with a member of etcd and a node that asks its own member first."""

    def __init__(self, index: int, netns: int, folder: Path) -> None:
        self.index, self.netns = index, netns
        self.label = NetnsName(f"machine{index}")
        self.port = Link(f"m{index}", Veth("eth0", self.label), master="br0")
        cluster = ",".join(f"m{i}=http://{address(i)}:2380" for i in range(COUNT))
        client, peer = f"http://{address(index)}:2379", f"http://{address(index)}:2380"
        arguments = (*TIMING, "--initial-cluster", cluster)
        self.member = Member(folder, f"m{index}", client, peer, arguments, netns=netns)
        self.manager: EtcdSubnets | None = None
        self.last: tuple[IPNetwork, ...] = ()
        self._client: EtcdClient | None = None
        self._task: asyncio.Task[None] | None = None

    def plan(self) -> tuple[Op, ...]:
        return (
            AddLink(self.port, Link("eth0", Veth(self.port.name))),
            AddAddress(Address("eth0", ipaddress.ip_interface(f"{address(self.index)}/24")), self.label),
            ChangeLink(Link("lo", Device()), self.label),
        )

    def client(self) -> EtcdClient:
        """A client on this machine."""

        def socket_there(info: aiohttp.AddrInfoType) -> socket.socket:
            return run_in_netns(self.netns, lambda: socket.socket(info[0], info[1], info[2]))

        endpoints = [f"http://{address((self.index + i) % COUNT)}:2379" for i in range(COUNT)]
        return EtcdClient(endpoints, timeout=1.0, socket_factory=socket_there)

    def start_node(self) -> None:
        self._client = self.client()
        self.manager = EtcdSubnets(self._client, prefix=PREFIX, last=self.last, ttl=TTL, margin=TTL / 2)
        self._task = asyncio.create_task(self._run(self.manager))

    async def _run(self, manager: EtcdSubnets) -> None:
        attrs = LeaseAttrs(
            public_ip=IPv4Address(address(self.index)),
            backend_type="vxlan",
            backend_data=vxlan_data(1, f"0a:00:00:00:00:0{self.index}"),
        )
        await manager.acquire(attrs)
        await manager.run()

    async def stop_node(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._client is not None:
            await self._client.close()
        self._task = self._client = None

    @property
    def key(self) -> str:
        """Where etcd has the node's lease."""
        assert self.manager is not None
        assert self.manager.own.lease is not None
        return f"{PREFIX}/subnets/{self.manager.own.lease.node}"

    @property
    def held(self) -> tuple[IPNetwork, ...]:
        """What the node may use now."""
        held = self.manager.own.held if self.manager and self._task else None
        return held.subnets if held else ()


def address(index: int) -> str:
    return f"192.0.2.{index + 1}"


class Site:
    def __init__(self, kernel: LinuxKernel, machines: list[Machine]) -> None:
        self.kernel, self.machines = kernel, machines
        self.admin = machines[-1].client()
        self.looks = 0

    async def watch_over(self) -> None:
        """Fails the test's task group in the moment in which a subnet has two holders."""
        while True:
            for one, other in combinations(self.machines, 2):
                assert not set(one.held) & set(other.held)
            self.looks += 1
            await asyncio.sleep(0.005)

    async def cable(self, machine: Machine, up: bool) -> None:
        assert (await self.kernel.apply((ChangeLink(replace(machine.port, up=up)),))).ok

    async def delete(self, key: str) -> None:
        """Whichever member is there does it."""
        for _ in range(COUNT):
            with contextlib.suppress(EtcdUnavailable):
                await self.admin.delete(key)
                return
        raise AssertionError("no member answers")

    async def all_hold(self) -> None:
        await until(lambda: all(m.held for m in self.machines))
        await until(lambda: all(len(m.manager.peers) == COUNT - 1 for m in self.machines if m.manager))

    def holdings(self) -> dict[int, tuple[IPNetwork, ...]]:
        return {m.index: m.held for m in self.machines}


async def until(probe: Callable[[], bool], within: float = 30.0) -> None:
    async with asyncio.timeout(within):
        while True:
            if probe():
                return
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def site(tmp_path: Path, make_netns: Callable[[], int]) -> AsyncIterator[Site]:
    need_etcd()
    kernel = LinuxKernel(make_netns())
    machines = [Machine(i, make_netns(), tmp_path) for i in range(COUNT)]
    for machine in machines:
        kernel.attach(machine.label, machine.netns)
    bridge = (AddLink(Link("br0", Bridge())), ChangeLink(Link("lo", Device()), HOST))
    applied = await kernel.apply((*bridge, *(op for machine in machines for op in machine.plan())))
    assert applied.ok, applied.failures
    made = Site(kernel, machines)
    try:
        await asyncio.gather(*(machine.member.start() for machine in machines))
        await answers(made.admin)
        await made.admin.put(f"{PREFIX}/config", CONFIG)
        for machine in machines:
            machine.start_node()
        yield made
    finally:
        for machine in machines:
            await machine.stop_node()
            await machine.member.end()
        await made.admin.close()
        await kernel.close()


@contextlib.asynccontextmanager
async def watched(site: Site) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        guard = group.create_task(site.watch_over())
        yield
        guard.cancel()
    assert site.looks > 100


async def test_members_are_killed_one_at_a_time_and_nobody_notices(site: Site) -> None:
    async with watched(site):
        await site.all_hold()
        before = site.holdings()
        for victim in site.machines:
            await victim.member.end()
            await answers(site.admin)  # the two that are left, perhaps with a new leader
            await victim.member.start()
            await answers(site.admin)
        await site.all_hold()
        assert site.holdings() == before
        assert [m.manager.counters.lost for m in site.machines if m.manager] == [0, 0, 0]


async def test_etcd_is_away_for_longer_than_the_leases(site: Site) -> None:
    """Nobody can have the subnets meanwhile, so that each node has its own again."""
    async with watched(site):
        await site.all_hold()
        before = site.holdings()
        for machine in site.machines:
            await machine.member.end()
        await until(lambda: not any(site.holdings().values()))
        assert all(m.manager and m.manager.own.holding is Holding.LAPSED for m in site.machines)
        for machine in site.machines:
            await machine.member.start()
        await site.all_hold()
        assert site.holdings() == before


async def test_a_machine_is_cut_off_and_its_subnet_is_given_to_another(site: Site) -> None:
    async with watched(site):
        await site.all_hold()
        first, second, third = site.machines
        lost = first.held
        await site.cable(first, up=False)
        began = time.monotonic()
        await until(lambda: not first.held)
        assert time.monotonic() - began < TTL + 1
        await until(lambda: second.manager is not None and len(second.manager.peers) == 1)
        # Another node may have the subnet now: the third starts anew, has forgotten its own and believes that this was it.
        await third.stop_node()
        await site.delete(third.key)
        third.last = lost
        third.start_node()
        await until(lambda: third.held == lost)
        assert first.manager is not None
        assert first.manager.own.lease is not None
        assert first.manager.own.lease.subnets == lost, "its pods still have the addresses"
        await site.cable(first, up=True)
        await site.all_hold()
        assert first.held != lost
        assert third.held == lost


async def test_cables_and_members_fail_in_turn(site: Site) -> None:
    async with watched(site):
        await site.all_hold()
        first, second, _ = site.machines
        await first.member.end()
        await site.cable(second, up=False)
        assert second.manager is not None
        counters = second.manager.counters
        await until(lambda: counters.renew_failures > 0)
        await first.member.start()
        await site.cable(second, up=True)
        before = counters.renewed + counters.acquired
        await until(lambda: counters.renewed + counters.acquired > before)
        await site.all_hold()

        async def tidy() -> bool:
            try:
                page = await site.admin.read(f"{PREFIX}/subnets/", prefix=True)
            except EtcdError:
                return False
            return len(page.kvs) == COUNT

        async with asyncio.timeout(15):
            while True:
                if await tidy():
                    break
                await asyncio.sleep(0.1)
