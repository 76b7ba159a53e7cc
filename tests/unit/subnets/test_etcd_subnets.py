"""The etcd manager in virtual time: what is too rare for chance, and what takes a day."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from random import Random
from typing import Any

import pytest
from virtualtime import run_virtual

from podwire.agent.subnets.etcd import QUIET, EtcdSubnets
from podwire.agent.subnets.port import Holding, OwnLease
from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    EtcdUnavailable,
    Operation,
    PutKey,
    TxnResponse,
    WatchResponse,
)
from podwire.plan.leases import Lease, LeaseAttrs, encode_attrs, vxlan_data
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient, Link

PREFIX = "/coreos.com/network"
CONFIG = b'{"Network":"10.5.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}'
DAY = 86400
OTHER = LeaseAttrs(public_ip=IPv4Address("192.168.0.99"), backend_type="vxlan", backend_data=vxlan_data(1, "0a:00:00:00:00:99"))


def attrs(index: int) -> LeaseAttrs:
    return LeaseAttrs(
        public_ip=IPv4Address(0xC0A80000 + index),
        backend_type="vxlan",
        backend_data=vxlan_data(1, f"0a:00:00:00:00:{index:02x}"),
    )


@dataclass
class Diary:
    """What the node was told of its own lease, and when."""

    entries: list[tuple[float, Holding]] = field(default_factory=list)

    def peer_changed(self, node: str, lease: Lease | None) -> None:
        """Not of interest."""

    def own_changed(self, own: OwnLease) -> None:
        self.entries.append((asyncio.get_running_loop().time(), own.holding))


@dataclass
class Scene:
    server: FakeEtcd = field(default_factory=FakeEtcd)
    link: Link = field(default_factory=Link)
    jump: float = 0.0
    """By how much the node's clock is ahead."""
    diary: Diary = field(default_factory=Diary)

    def __post_init__(self) -> None:
        self.server.txn([], [PutKey(f"{PREFIX}/config", CONFIG)], [])

    def leased(self) -> list[str]:
        return sorted(key.rpartition("/")[2] for key in self.server.keys if "/subnets/" in key)

    def put(self, key: str, value: bytes, ttl: int = DAY) -> None:
        self.server.txn([], [PutKey(f"{PREFIX}/subnets/{key}", value, self.server.grant(ttl).id)], [])

    def delete(self, key: str) -> None:
        self.server.txn([], [DeleteKeys(f"{PREFIX}/subnets/{key}")], [])

    def manager(self, client: FakeEtcdClient | None = None, **settings: Any) -> EtcdSubnets:
        made = EtcdSubnets(
            client or FakeEtcdClient(self.server, self.link),
            prefix=PREFIX,
            clock=lambda: asyncio.get_running_loop().time() + self.jump,
            rng=Random(3),
            **settings,
        )
        made.subscribe(self.diary)
        return made

    @asynccontextmanager
    async def running(self, client: FakeEtcdClient | None = None, **settings: Any) -> AsyncGenerator[EtcdSubnets, None]:
        manager = self.manager(client, **settings)
        await manager.acquire(attrs(1))
        task = asyncio.create_task(manager.run())
        try:
            yield manager
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def story(tell: Callable[[Scene], Awaitable[None]]) -> Callable[[], None]:
    """A test that runs in virtual time."""

    def test() -> None:
        async def main() -> None:
            await tell(Scene())

        run_virtual(main())

    test.__doc__ = tell.__doc__
    return test


@story
async def test_a_lease_is_renewed_an_hour_before_its_end(scene: Scene) -> None:
    async with scene.running() as manager:
        before = scene.server.requests
        await asyncio.sleep(3 * DAY)
        assert [holding for _, holding in scene.diary.entries] == [Holding.HELD]
        assert manager.counters.renewed == 3
        watches = 1 + 3 * DAY / QUIET
        assert scene.server.requests - before == 3 * 2 + watches, "a node at rest asks for nothing else"


@story
async def test_etcd_is_away_for_25_hours(scene: Scene) -> None:
    """The lease ran out there, and here a little earlier; the same subnet is held again as soon as etcd is back."""
    async with scene.running() as manager:
        lease = manager.own.held
        began = asyncio.get_running_loop().time()
        scene.link.up = False
        await asyncio.sleep(25 * 3600)
        assert scene.leased() == []
        at, holding = scene.diary.entries[-1]
        assert holding is Holding.LAPSED
        assert 0.98 * DAY < at - began < DAY
        assert manager.own.lease == lease
        scene.link.up = True
        await asyncio.sleep(120)
        assert manager.own.held == lease
        assert manager.counters.renew_failures > 0


@story
async def test_the_clock_jumps_while_the_machine_sleeps(scene: Scene) -> None:
    async with scene.running() as manager:
        lease = manager.own.held
        scene.jump = 2.0 * DAY
        assert manager.own.holding is Holding.LAPSED, "at once, before anything else has run"
        scene.put(scene.leased()[0], encode_attrs(OTHER))
        await asyncio.sleep(100)
        assert manager.own.held not in (None, lease)


@story
async def test_the_clock_jumps_but_the_lease_is_still_ours(scene: Scene) -> None:
    async with scene.running() as manager:
        lease = manager.own.held
        scene.jump = 2.0 * DAY
        await asyncio.sleep(100)
        assert manager.own.held == lease
        assert manager.counters.lost == 0


class LateTxn(FakeEtcdClient):
    """The first write happens only long after the client has given up."""

    waiting = True

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse:
        if self.waiting and any(isinstance(operation, PutKey) for operation in success):
            self.waiting = False
            loop = asyncio.get_running_loop()
            loop.call_later(20, self._late, compare, success)
            raise EtcdUnavailable("timeout", "no answer", sent=True)
        return await super().txn(compare, success, failure)

    def _late(self, compare: Sequence[Compare], success: Sequence[Operation]) -> None:
        try:
            self._server.txn(compare, success, [])
        except Exception as error:  # what a test wants to know
            self.refused = str(error)


@story
async def test_a_write_that_comes_late_finds_its_lease_revoked(scene: Scene) -> None:
    """Nothing would tell its subnet free again for a day."""
    client = LateTxn(scene.server, scene.link)
    async with scene.running(client) as manager:
        await asyncio.sleep(60)
        assert manager.own.held is not None
        assert scene.leased() == [manager.own.held.node]
        assert "lease not found" in client.refused


class SilentWatch(FakeEtcdClient):
    """The watch is open and tells nothing."""

    async def watch(
        self, key: str, *, prefix: bool = False, start_revision: int = 0, prev_kv: bool = False
    ) -> AsyncGenerator[WatchResponse, None]:
        await asyncio.sleep(100 * DAY)
        yield WatchResponse()


@story
async def test_a_renewal_looks_whose_key_it_is(scene: Scene) -> None:
    """The etcd lease is still there, but another writes over the key (as flannel's renewal does), and the watch is deaf."""
    async with scene.running(SilentWatch(scene.server, scene.link)) as manager:
        lease = manager.own.held
        assert lease is not None
        scene.put(lease.node, encode_attrs(OTHER), 10 * DAY)
        await asyncio.sleep(DAY)
        assert manager.counters.lost == 1
        assert manager.own.held not in (None, lease)


class DeletedMeanwhile(FakeEtcdClient):
    """Once armed: between a write and its answer somebody deletes the key, and the watch is the faster one."""

    armed = False

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse:
        answer = await super().txn(compare, success, failure)
        if self.armed and isinstance(success[0], PutKey):
            self.armed = False
            self._server.txn([], [DeleteKeys(success[0].key)], [])
            await asyncio.sleep(5)
        return answer


@story
async def test_a_lease_that_was_lost_before_we_knew_of_it_is_not_held(scene: Scene) -> None:
    client = DeletedMeanwhile(scene.server, scene.link)
    async with scene.running(client) as manager:
        client.armed = True
        scene.delete(scene.leased()[0])
        for _ in range(300):
            await asyncio.sleep(0.1)
            held = manager.own.held
            assert held is None or held.node in scene.leased()
        assert manager.own.held is not None


@story
async def test_a_reservation_made_of_our_lease_never_runs_out(scene: Scene) -> None:
    async with scene.running() as manager:
        lease = manager.own.held
        assert lease is not None
        key = f"{PREFIX}/subnets/{lease.node}"
        scene.server.txn([], [PutKey(key, scene.server.keys[key].value)], [])
        await asyncio.sleep(1)
        scene.link.up = False
        await asyncio.sleep(2 * DAY)
        assert manager.own.held == lease


@story
async def test_a_hundred_nodes_at_once(scene: Scene) -> None:
    """All have a subnet of their own within a second, with six requests each, or little more."""
    managers = [scene.manager(FakeEtcdClient(scene.server, Link(delay=0.05, rng=Random(i)))) for i in range(100)]
    for index, manager in enumerate(managers):
        manager._rng = Random(index)
    began = asyncio.get_running_loop().time()
    leases = await asyncio.gather(*(manager.acquire(attrs(index + 1)) for index, manager in enumerate(managers)))
    assert len({lease.subnets for lease in leases}) == 100
    assert asyncio.get_running_loop().time() - began < 2.0
    assert scene.server.requests < 1000


def test_run_virtual_notices_that_nothing_can_happen() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="never happen"):
        run_virtual(forever())
