"""Three nodes, three subnets, and everything that can go wrong on the way to etcd, at random: never two owners of a subnet, and
when it is over everybody has one, knows the others', and nothing is left behind."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from itertools import combinations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from virtualtime import run_virtual

from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.port import Holding
from podwire.client.etcdmessages import DeleteKeys, EtcdCompacted, PutKey
from podwire.plan.leases import LeaseAttrs, vxlan_data
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient, Link

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
steps = st.lists(
    st.tuples(
        st.sampled_from(["cut", "heal", "crash", "start", "delete", "compact", "flaky", "calm", "leader", "take", "wait"]),
        st.integers(0, 2),
        st.floats(0, 70),
    ),
    max_size=25,
)


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
    def __init__(self, index: int, server: FakeEtcd, family: str, rng: Random) -> None:
        self.index, self.rng = index, rng
        self.link = Link(delay=0.05, rng=Random(rng.random()))
        self.client = FakeEtcdClient(server, self.link)
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
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

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

    def check(self) -> None:
        for one, other in combinations(self.machines, 2):
            assert not set(one.held) & set(other.held), f"{one.held} has two owners"

    async def run(self, script: list[Step]) -> None:
        server = FakeEtcd(lazy=lambda: self.rng.choice([0.0, 0.0, self.rng.uniform(0, 30)]))
        self.server = server
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
                    self.server.txn([], [DeleteKeys(keys[machine.index % len(keys)])], [])
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

    async def take(self, machine: Machine) -> None:
        """A flannel that uses the machine's address, or writes over its key as flannel's renewal does."""
        keys = sorted(k for k in self.server.keys if "/subnets/" in k)
        if keys:
            foreign = b'{"PublicIP":"192.168.0.77","PublicIPv6":"fd00::77","BackendType":"vxlan"}'
            lease = self.server.grant(30)
            self.server.txn([], [PutKey(keys[machine.index % len(keys)], foreign, lease.id)], [])

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


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.integers(0, 2**32), steps)
def test_no_subnet_ever_has_two_owners(family: str, seed: int, script: list[Step]) -> None:
    model = Model(family, seed)
    run_virtual(model.run(script), model.check)
