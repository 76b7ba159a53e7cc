"""Three nodes, three subnets, and everything that can go wrong on the way to etcd, at random: never two owners of a subnet, and
when it is over everybody has one, knows the others', and nothing is left behind."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from itertools import combinations
from random import Random
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtualtime import run_virtual

from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.port import Holding
from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    EtcdCompacted,
    EtcdEvent,
    LeaseResponse,
    Operation,
    PutKey,
    TxnResponse,
)
from podwire.plan.leases import LeaseAttrs, decode_attrs, vxlan_data
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient, Link

T = TypeVar("T")

PREFIX = "/coreos.com/network"
TTL = 100
CONFIGS = {
    "ipv4": b'{"Network":"10.5.0.0/22","SubnetLen":24,"Backend":{"Type":"vxlan"}}',
    "dual": b'{"Network":"10.5.0.0/22","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:5::/62","IPv6SubnetLen":64,'
    b'"Backend":{"Type":"vxlan"}}',
    "ipv6": b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/62","IPv6SubnetLen":64,"Backend":{"Type":"vxlan"}}',
}
"""Each has three subnets of a family: the first of four is not given out."""

Step = tuple[str, int, float]
ACTIONS = (
    "cut", "heal", "crash", "start", "delete", "compact", "flaky", "calm", "leader", "take", "wait", "doze", "nap", "move"
)  # fmt: skip
steps = st.lists(
    st.tuples(
        st.sampled_from(ACTIONS),
        st.integers(0, 2),
        st.floats(0, 70),
    ),
    max_size=25,
)


class WatchedEtcd(FakeEtcd):
    """Sees to it that nobody of ours writes over, or deletes, what is another's, or holds what has run out.

    machine_of: whose address that is. held: (machine, key) of what each holds by its own clock."""

    def __init__(
        self, machine_of: Callable[[str], int | None], held: Callable[[], set[tuple[int, str]]], lazy: Callable[[], float]
    ) -> None:
        super().__init__(lazy=lazy)
        self._machine_of, self._held = machine_of, held
        self._writer: int | None = None
        self.robbed = ""
        self.deceived: set[tuple[int, str]] = set()
        """(machine, key) of what a stranger wrote over or deleted: a machine that is cut off cannot know, and holds until its
        own end what etcd may have given to another by then. No program can do better."""

    def by_stranger(self, operation: PutKey | DeleteKeys) -> None:
        name = operation.key.rpartition("/")[2]
        self.deceived |= {(machine, key) for machine, key in self._held() if key == name}
        self.txn([], [operation], [])

    def txn_of(self, machine: int, compare: Sequence[Compare], success: Sequence[Operation]) -> TxnResponse:
        self._writer = machine
        try:
            return self.txn(compare, success, ())
        finally:
            self._writer = None

    def revoke(self, lease: int) -> None:
        for key, kv in self.keys.items():
            owner = self._machine_of(_address(kv.value)) if kv.lease == lease else None
            if owner is not None and (owner, key.rpartition("/")[2]) in self._held():
                self.robbed = f"{key} ran out, and machine {owner} holds it still"
        super().revoke(lease)

    def _commit(self, events: list[EtcdEvent]) -> None:
        for event in events if self._writer is not None else ():
            if event.prev_kv is not None:
                owner = self._machine_of(_address(event.prev_kv.value))
                if owner != self._writer:
                    self.robbed = f"machine {self._writer} did {event.type} to {event.kv.key} of {owner}"
        super()._commit(events)


def _address(value: bytes) -> str:
    attrs = decode_attrs(value)
    assert attrs is not None
    return str(attrs.public_ip or attrs.public_ipv6)


class DozingClient(FakeEtcdClient):
    """The client of a machine that may be suspended: between what it has read and what it writes (`doze`), and before it hears
    how long a lease is its own (`nap`)."""

    def __init__(self, server: WatchedEtcd, link: Link, machine: int) -> None:
        super().__init__(server, link)
        self._watched, self._machine = server, machine
        self.doze = self.nap = 0.0

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse:
        doze, self.doze = self.doze, 0.0
        await asyncio.sleep(doze)
        return await self._ask(lambda: self._watched.txn_of(self._machine, compare, success))

    async def grant(self, ttl: int) -> LeaseResponse:
        return await self._before_a_nap(await super().grant(ttl))

    async def keep_alive(self, lease: int) -> int:
        return await self._before_a_nap(await super().keep_alive(lease))

    async def _before_a_nap(self, answer: T) -> T:
        nap, self.nap = self.nap, 0.0
        await asyncio.sleep(nap)
        return answer


@dataclass
class Peers:
    """A listener that believes what it is told."""

    told: dict[str, object] = field(default_factory=dict)
    own: object = None

    def peer_changed(self, node: str, lease: object) -> None:
        if lease is None:
            del self.told[node]
        else:
            self.told[node] = lease

    def own_changed(self, own: object) -> None:
        self.own = own


class Machine:
    def __init__(self, index: int, server: WatchedEtcd, family: str, rng: Random) -> None:
        self.index, self.rng = index, rng
        self.link = Link(delay=0.05, rng=Random(rng.random()))
        self.client = DozingClient(server, self.link, index)
        ip4 = IPv4Address(f"192.168.0.{index + 1}") if family != "ipv6" else None
        ip6 = IPv6Address(f"fd00::{index + 1}") if family != "ipv4" else None
        self.attrs = LeaseAttrs(
            public_ip=ip4,
            public_ipv6=ip6,
            backend_type="vxlan",
            backend_data=vxlan_data(1, f"0a:00:00:00:00:0{index}") if ip4 else "",
            backend_v6_data=vxlan_data(1, f"0a:00:00:00:06:0{index}") if ip6 else "",
        )
        self.rate, self.offset = rng.uniform(0.996, 1.004), rng.uniform(-1e6, 1e6)
        self.manager: EtcdSubnets | None = None
        self.listener = Peers()
        self.last: tuple[object, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    def clock(self) -> float:
        return asyncio.get_running_loop().time() * self.rate + self.offset

    def start(self) -> None:
        if self._task is not None:
            return
        last = self.manager.own.lease.subnets if self.manager and self.manager.own.lease else ()
        self.manager = EtcdSubnets(
            self.client, prefix=PREFIX, last=last, ttl=TTL, margin=40, clock=self.clock, rng=Random(self.rng.random())
        )
        self.listener = Peers()
        self.manager.subscribe(self.listener)
        self._task = asyncio.create_task(self._run(self.manager))

    async def _run(self, manager: EtcdSubnets) -> None:
        await manager.acquire(self.attrs)
        await manager.run()

    async def crash(self) -> None:
        for task in (self._task, self._telling):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._task = self._telling = None

    async def move(self) -> None:
        """It has another address of its two from now on."""
        four, six = self.attrs.public_ip, self.attrs.public_ipv6
        step = 10 if int(four or six or 0) & 0xFF < 10 else -10
        self.attrs = replace(self.attrs, public_ip=four and four + step, public_ipv6=six and six + step)
        if self._telling is not None:
            self._telling.cancel()
        if self.manager is not None and self._task is not None and self.manager.own.lease is not None:
            self._telling = asyncio.create_task(self.manager.update(self.attrs))
        elif self._task is not None:
            await self.crash()
            self.start()

    @property
    def held(self) -> tuple[object, ...]:
        if self._task is None or self.manager is None:
            return ()
        held = self.manager.own.held
        return held.subnets if held else ()


class Model:
    def __init__(self, family: str, seed: int) -> None:
        self.rng = Random(seed)
        self.family = family
        self.machines: list[Machine] = []
        self.server = WatchedEtcd(self.machine_of, self.held, lambda: self.rng.choice([0.0, 0.0, self.rng.uniform(0, 30)]))

    def check(self) -> None:
        assert not self.server.robbed
        held = {machine.index: machine.held for machine in self.machines}
        if self.server.deceived:
            self.server.deceived &= self.held()  # the others know
            held |= {index: () for index, _ in self.server.deceived}
        for one, other in combinations(held.values(), 2):
            assert not (one and other) or not set(one) & set(other), f"{one} has two owners"

    async def run(self, script: list[Step]) -> None:
        server = self.server
        server.txn([], [PutKey(f"{PREFIX}/config", CONFIGS[self.family])], [])
        self.machines = [Machine(i, server, self.family, self.rng) for i in range(3)]
        for machine in self.machines:
            machine.start()
        for action, index, duration in script:
            await self.act(action, self.machines[index])
            await asyncio.sleep(duration)
        for machine in self.machines:
            machine.link.up, machine.link.lost, machine.link.late = True, 0.0, 0.0
            machine.start()
        await asyncio.sleep(2 * TTL + 400)
        self.settled()
        for machine in self.machines:
            await machine.crash()

    def held(self) -> set[tuple[int, str]]:
        running = ((machine.index, machine.manager.own.held) for machine in self.machines if machine.held and machine.manager)
        return {(index, lease.node) for index, lease in running if lease is not None}

    def machine_of(self, address: str) -> int | None:
        """Whose address that is; None: a stranger's."""
        last = int(address.rpartition("." if "." in address else ":")[2], 10 if "." in address else 16) % 10 - 1
        return last if last < len(self.machines) else None

    async def act(self, action: str, machine: Machine) -> None:
        match action:
            case "cut":
                machine.link.up = False
            case "heal":
                machine.link.up = True
            case "crash":
                await machine.crash()
            case "start":
                machine.start()
            case "delete":
                keys = sorted(k for k in self.server.keys if "/subnets/" in k)
                if keys:
                    self.server.by_stranger(DeleteKeys(keys[machine.index % len(keys)]))
            case "compact":
                with contextlib.suppress(EtcdCompacted):
                    self.server.compact(self.server.revision)
            case "flaky":
                machine.link.lost, machine.link.late = 0.2, 0.2
            case "calm":
                machine.link.lost, machine.link.late = 0.0, 0.0
            case "leader":
                self.server.extend_all()
            case "take":
                await self.take(machine)
            case "doze":
                await self.doze(machine)
            case "nap":
                machine.client.nap = self.rng.uniform(0, 1.5 * TTL)
            case "move":
                await machine.move()

    async def take(self, machine: Machine) -> None:
        """A flannel writes over one of the keys, as its renewal does."""
        keys = sorted(k for k in self.server.keys if "/subnets/" in k)
        if keys:
            self.put_foreign(keys[machine.index % len(keys)])

    def put_foreign(self, key: str) -> None:
        foreign = b'{"PublicIP":"192.168.0.77","PublicIPv6":"fd00::77","BackendType":"vxlan"}'
        self.server.by_stranger(PutKey(key, foreign, self.server.grant(30).id))

    async def doze(self, machine: Machine) -> None:
        """It starts again, and is suspended between its first look and its first write. Meanwhile another takes its subnet."""
        leases = {k: self.machine_of(_address(kv.value)) for k, kv in self.server.keys.items() if "/subnets/" in k}
        key = next((k for k, owner in leases.items() if owner == machine.index), "")
        await machine.crash()
        machine.client.doze = self.rng.uniform(0, 2 * TTL)
        machine.start()
        if key and self.rng.random() < 0.7:
            asyncio.get_running_loop().call_later(self.rng.uniform(0, machine.client.doze), self.put_foreign, key)

    def settled(self) -> None:
        keys = {k.rpartition("/")[2] for k in self.server.keys if "/subnets/" in k}
        owners = {}
        for machine in self.machines:
            assert machine.manager is not None
            own = machine.manager.own
            assert own.holding is Holding.HELD, own.why
            assert own.lease is not None
            owners[own.lease.node] = own.lease
        assert owners.keys() == keys
        for machine in self.machines:
            assert machine.manager is not None
            assert machine.manager.own.lease is not None
            others = {name: lease for name, lease in owners.items() if name != machine.manager.own.lease.node}
            assert dict(machine.manager.peers) == others
            assert machine.listener.told == others
            assert machine.listener.own == machine.manager.own


@pytest.mark.timeout(90)
@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.integers(0, 2**32), steps)
def test_no_subnet_ever_has_two_owners(family: str, seed: int, script: list[Step]) -> None:
    model = Model(family, seed)
    run_virtual(model.run(script), model.check)
