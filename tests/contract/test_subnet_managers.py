"""The contract of subnet managers: etcd's over a fake and over Debian's etcd, and kube's over an API server; and what only
etcd's has to cope with."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from etcdrig import answers, one_member

from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.kube import KubeSubnets
from podwire.agent.subnets.port import Holding, OwnLease, SubnetManager
from podwire.client.api import ApiClient
from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import Compare, EtcdDenied, PutKey
from podwire.client.informer import Informer
from podwire.model.errors import InvalidInput
from podwire.model.netconf import parse_net_config
from podwire.model.objects import Node
from podwire.model.resources import NODES
from podwire.plan.leases import Lease, LeaseAttrs, encode_attrs, vxlan_data
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient
from podwire.testing.memorycluster import memory_cluster

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

CONFIG = b'{"Network":"10.5.0.0/22","SubnetLen":24,"Backend":{"Type":"vxlan"}}'
"""Three subnets: 10.5.1.0/24 to 10.5.3.0/24."""
TTL = 2


def attrs(index: int, mac: int = 0) -> LeaseAttrs:
    return LeaseAttrs(
        public_ip=IPv4Address(f"192.168.0.{index}"),
        backend_type="vxlan",
        backend_data=vxlan_data(1, f"0a:00:00:00:{mac:02x}:{index:02x}"),
    )


async def until(probe: Callable[[], object | Awaitable[object]], within: float = 15.0) -> None:
    async with asyncio.timeout(within):
        while True:
            answer = probe()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return
            await asyncio.sleep(0.02)


@dataclass
class Listener:
    """Notes what it is told, and that it fits together."""

    peers: dict[str, Lease] = field(default_factory=dict)
    own: list[OwnLease] = field(default_factory=list)

    def peer_changed(self, node: str, lease: Lease | None) -> None:
        assert self.peers.get(node) != lease
        if lease is None:
            del self.peers[node]
        else:
            self.peers[node] = lease

    def own_changed(self, own: OwnLease) -> None:
        self.own.append(own)


class World(Protocol):
    """Where managers find their configuration and leases."""

    def manager(self, index: int) -> SubnetManager: ...

    async def remove(self, lease: Lease) -> None:
        """Somebody takes the node's subnet from it."""
        ...

    async def close(self) -> None: ...


Etcd = EtcdClient | FakeEtcdClient


class EtcdWorld:
    def __init__(self, client: Etcd, prefix: str) -> None:
        self.client, self.prefix = client, prefix

    def manager(self, index: int, **settings: Any) -> EtcdSubnets:
        return EtcdSubnets(self.client, prefix=self.prefix, **({"ttl": 100, "margin": 40} | settings))

    async def configure(self, text: bytes = CONFIG) -> None:
        await self.client.put(f"{self.prefix}/config", text)

    async def put(self, name: str, value: LeaseAttrs, ttl: int = 100) -> None:
        lease = (await self.client.grant(ttl)).id if ttl else 0
        await self.client.put(f"{self.prefix}/subnets/{name}", encode_attrs(value), lease)

    async def keys(self) -> list[str]:
        page = await self.client.read(f"{self.prefix}/subnets/", prefix=True)
        return [kv.key.rpartition("/")[2] for kv in page.kvs]

    async def remove(self, lease: Lease) -> None:
        await self.client.delete(f"{self.prefix}/subnets/{lease.node}")

    async def close(self) -> None:
        """Nothing to close."""


class KubeWorld:
    def __init__(self, client: ApiClient, stack: AsyncExitStack) -> None:
        self.client, self._stack = client, stack
        self._tasks: list[asyncio.Task[None]] = []

    async def configure(self) -> None:
        for index in (1, 2, 3):
            await self.add_node(index)

    async def add_node(self, index: int, third: int | None = None) -> None:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"m{index}"}}
        cidr = f"10.5.{third or index}.0/24"
        await self.client.create(NODES, node | {"spec": {"podCIDR": cidr, "podCIDRs": [cidr]}})

    def manager(self, index: int) -> KubeSubnets:
        informer = Informer(self.client, NODES, Node)
        self._tasks.append(asyncio.create_task(informer.run()))
        config = parse_net_config(CONFIG, leased=False)
        return KubeSubnets(informer, f"m{index}", config, client=self.client)

    async def remove(self, lease: Lease) -> None:
        await self.client.delete(NODES, lease.node)
        await self.add_node(int(lease.node[1:]))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()


StartEtcd = Callable[[], Awaitable[EtcdClient]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[StartEtcd]:
    """Debian's etcd, one for all tests, started when it is first asked for."""
    clients: list[EtcdClient] = []
    async with AsyncExitStack() as stack:

        async def start() -> EtcdClient:
            if not clients:
                member = await stack.enter_async_context(one_member(tmp_path_factory.mktemp("etcd")))
                clients.append(await stack.enter_async_context(EtcdClient([member.client_url])))
                await answers(clients[0])
            return clients[0]

        yield start


@pytest_asyncio.fixture(loop_scope="module", params=["fake", "etcd"])
async def etcd(request: pytest.FixtureRequest, start_etcd: StartEtcd) -> EtcdWorld:
    client = FakeEtcdClient(FakeEtcd()) if request.param == "fake" else await start_etcd()
    world = EtcdWorld(client, f"/{request.node.name}")
    await world.configure()
    return world


@pytest_asyncio.fixture(loop_scope="module", params=["fake", "etcd", "kube"])
async def world(request: pytest.FixtureRequest, tmp_path: Path, start_etcd: StartEtcd) -> AsyncIterator[World]:
    made: EtcdWorld | KubeWorld
    if request.param == "kube":
        stack = AsyncExitStack()
        cluster = await stack.enter_async_context(memory_cluster(tmp_path))
        made = KubeWorld(cluster.client, stack)
    else:
        made = EtcdWorld(FakeEtcdClient(FakeEtcd()) if request.param == "fake" else await start_etcd(), f"/{request.node.name}")
    await made.configure()
    yield made
    await made.close()


class Running:
    """Managers that run, each with a listener, until the block ends."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Running":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            await self.stop(task)

    async def start(self, manager: SubnetManager, own: LeaseAttrs) -> Listener:
        listener = Listener()
        manager.subscribe(listener)
        async with asyncio.timeout(15):
            await manager.acquire(own)
        self._tasks.append(asyncio.create_task(manager.run()))
        return listener

    async def stop(self, task: asyncio.Task[None] | None = None) -> None:
        task = task or self._tasks.pop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- all managers -------------------------------------------------------------------------------------------------------


async def test_nodes_get_subnets_of_their_own_and_know_each_other(world: World) -> None:
    async with Running() as running:
        managers = [world.manager(index) for index in (1, 2, 3)]
        listeners = [await running.start(manager, attrs(index)) for index, manager in enumerate(managers, 1)]
        leases = [manager.own.held for manager in managers]
        assert sorted(lease.subnets[0] for lease in leases if lease) == [IPv4Network(f"10.5.{n}.0/24") for n in (1, 2, 3)]
        for manager, listener in zip(managers, listeners, strict=True):
            others = {lease.node: lease for lease in leases if lease and lease != manager.own.lease}
            await until(lambda m=manager, o=others: dict(m.peers) == o)  # type: ignore[misc]
            assert listener.peers == others
            assert listener.own[-1] == manager.own
            assert manager.own.lease not in listener.peers.values()
        assert {lease.attrs for lease in leases if lease} == {attrs(index) for index in (1, 2, 3)}


async def test_a_node_that_starts_again_has_its_subnet_again_and_its_peers_hear_what_is_new(world: World) -> None:
    async with Running() as running:
        one, two = world.manager(1), world.manager(2)
        listener = await running.start(one, attrs(1))
        await running.start(two, attrs(2))
        before = two.own.held
        assert before is not None
        await running.stop()
        again = world.manager(2)
        await running.start(again, attrs(2, mac=7))
        assert again.own.lease == Lease(before.node, before.subnets, attrs(2, mac=7))
        await until(lambda: listener.peers == {before.node: again.own.lease})


async def test_a_subnet_that_is_taken_away_is_not_held_until_there_is_one_again(world: World) -> None:
    async with Running() as running:
        manager, peer = world.manager(1), world.manager(2)
        listener = await running.start(manager, attrs(1))
        seen = await running.start(peer, attrs(2))
        lease = manager.own.held
        assert lease is not None
        await until(lambda: lease.node in seen.peers)
        await world.remove(lease)
        await until(lambda: Holding.LAPSED in [own.holding for own in listener.own])
        lapsed = next(own for own in listener.own if own.holding is Holding.LAPSED)
        assert lapsed.held is None
        assert lapsed.lease == lease
        assert lapsed.why
        await until(lambda: manager.own.holding is Holding.HELD)
        assert manager.own.lease == lease
        assert manager.counters.lost == 1
        await until(lambda: seen.peers.get(lease.node) == lease)


async def test_a_node_that_moves_keeps_its_subnet_and_tells_its_peers(world: World) -> None:
    """Another address of the node: the same lease, with other words."""
    async with Running() as running:
        one, two = world.manager(1), world.manager(2)
        listener = await running.start(one, attrs(1))
        seen = await running.start(two, attrs(2))
        before = two.own.held
        assert before is not None
        await two.update(attrs(77))
        moved = Lease(before.node, before.subnets, attrs(77))
        await until(lambda: listener.peers == {before.node: moved})
        assert two.own == OwnLease(moved, Holding.HELD)
        assert Holding.LAPSED not in {own.holding for own in seen.own}
        assert two.counters.lost == 0
        assert two.counters.acquired == 1
        await running.stop()
        again = world.manager(2)
        await running.start(again, attrs(77))
        assert again.own.lease == moved


async def test_what_is_released_is_gone_for_the_peers(world: World) -> None:
    async with Running() as running:
        one, two = world.manager(1), world.manager(2)
        await running.start(two, attrs(2))
        seen = await running.start(one, attrs(1))
        await until(lambda: len(seen.peers) == 1)
        assert (await one.network_config()).networks == (IPv4Network("10.5.0.0/22"),)
        await two.release()
        await until(lambda: seen.peers == {})


# --- etcd ---------------------------------------------------------------------------------------------------------------


async def test_two_nodes_race_for_the_last_subnet(etcd: EtcdWorld) -> None:
    await etcd.put("10.5.1.0-24", attrs(10))
    await etcd.put("10.5.2.0-24", attrs(11), ttl=0)
    managers = [etcd.manager(index) for index in (1, 2)]
    tasks = [asyncio.create_task(m.acquire(attrs(i))) for i, m in enumerate(managers, 1)]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert len(done) == 1
    assert done.pop().result().subnets == (IPv4Network("10.5.3.0/24"),)
    loser = managers[tasks.index(next(iter(waiting)))]
    await until(lambda: "all 3 subnets" in loser.own.why)
    await etcd.client.delete(f"{etcd.prefix}/subnets/10.5.1.0-24")
    (lease,) = await asyncio.gather(*waiting)
    assert lease.subnets == (IPv4Network("10.5.1.0/24"),)


async def test_the_last_subnet_is_taken_again_only_if_it_is_free(etcd: EtcdWorld) -> None:
    await etcd.put("10.5.2.0-24", attrs(10))
    mine = (IPv4Network("10.5.3.0/24"),)
    assert (await etcd.manager(1, last=mine).acquire(attrs(1))).subnets == mine
    theirs = (IPv4Network("10.5.2.0/24"),)
    assert (await etcd.manager(2, last=theirs).acquire(attrs(2))).subnets == (IPv4Network("10.5.1.0/24"),)


async def test_a_reservation_is_kept_as_one(etcd: EtcdWorld) -> None:
    """A key without an etcd lease: the node whose address it has may use it, and it never expires."""
    await etcd.put("10.5.2.0-24", attrs(1), ttl=0)
    async with Running() as running:
        manager = etcd.manager(1, ttl=TTL, margin=1)
        await running.start(manager, attrs(1, mac=9))
        assert manager.own.lease is not None
        assert manager.own.lease.subnets == (IPv4Network("10.5.2.0/24"),)
    kv = await etcd.client.get(f"{etcd.prefix}/subnets/10.5.2.0-24")
    assert kv is not None
    assert kv.lease == 0
    assert kv.value == encode_attrs(attrs(1, mac=9))


async def test_a_lease_is_renewed_for_as_long_as_the_node_lives_and_no_longer(etcd: EtcdWorld) -> None:
    async with Running() as running:
        manager = etcd.manager(1, ttl=TTL, margin=1)
        listener = await running.start(manager, attrs(1))
        await until(lambda: manager.counters.renewed >= 3)
        assert [own.holding for own in listener.own] == [Holding.HELD]
        assert await etcd.keys() == [manager.own.lease.node if manager.own.lease else ""]

    async def gone() -> bool:
        return not await etcd.keys()

    await until(gone)


async def test_somebody_writes_over_the_lease(etcd: EtcdWorld) -> None:
    """As a flannel would that came back after its lease had expired. Its claim stands; ours gives way, and finds another."""
    async with Running() as running:
        manager = etcd.manager(1)
        listener = await running.start(manager, attrs(1))
        first = manager.own.held
        assert first is not None
        await etcd.put(first.node, attrs(9))
        await until(lambda: len(listener.own) == 3)
        assert "192.168.0.9" in listener.own[1].why
        assert manager.own.held is not None
        assert manager.own.held.subnets != first.subnets
        assert listener.peers == {first.node: Lease(first.node, first.subnets, attrs(9))}


async def test_two_nodes_with_one_address_do_not_share_a_subnet(etcd: EtcdWorld) -> None:
    async with Running() as running:
        manager = etcd.manager(1)
        listener = await running.start(manager, attrs(1))
        first = manager.own.held
        assert first is not None
        await etcd.put(first.node, attrs(1, mac=5))
        await until(lambda: len(listener.own) == 3)
        assert "our address" in listener.own[1].why
        assert manager.own.held is not None
        assert manager.own.held.subnets != first.subnets


async def test_unknown_fields_are_kept_and_strange_keys_skipped(etcd: EtcdWorld) -> None:
    lease = (await etcd.client.grant(100)).id
    theirs = b'{"PublicIP":"192.168.0.1","PublicIPv6":null,"BackendType":"vxlan","Zone":"a","BackendData":{"VNI":1,"New":2}}'
    await etcd.client.txn(
        [Compare(f"{etcd.prefix}/subnets/10.5.2.0-24", "VERSION", 0)],
        [
            PutKey(f"{etcd.prefix}/subnets/10.5.2.0-24", theirs, lease),
            PutKey(f"{etcd.prefix}/subnets/nonsense", b"{}"),
            PutKey(f"{etcd.prefix}/subnets/10.5.3.0-24", b"no JSON"),
        ],
    )
    manager = etcd.manager(1)
    await manager.acquire(attrs(1))
    kv = await etcd.client.get(f"{etcd.prefix}/subnets/10.5.2.0-24")
    assert kv is not None
    assert kv.value == encode_attrs(attrs(1))[:-1] + b',"Zone":"a"}'
    assert dict(manager.peers) == {}


async def test_a_subnet_outside_a_changed_network_is_given_up(etcd: EtcdWorld) -> None:
    await etcd.put("10.9.2.0-24", attrs(1))
    lease = await etcd.manager(1).acquire(attrs(1))
    assert lease.subnets[0] in CONFIGURED
    assert await etcd.keys() == [lease.node]


CONFIGURED = parse_net_config(CONFIG).ranges.values().__iter__().__next__()


async def test_the_configuration_is_waited_for_and_checked(etcd: EtcdWorld) -> None:
    await etcd.client.delete(f"{etcd.prefix}/config")
    manager = etcd.manager(1)
    reading = asyncio.create_task(manager.network_config())
    await until(lambda: "no network configuration yet" in manager.own.why)
    await etcd.configure(b'{"Network":"10.5.0.0/22","SubnetLen":23}')
    with pytest.raises(InvalidInput, match=r"etcd key .*/config: SubnetLen 23"):
        await reading


async def test_a_reservation_follows_its_node(etcd: EtcdWorld) -> None:
    await etcd.put("10.5.2.0-24", attrs(1), ttl=0)
    async with Running() as running:
        manager = etcd.manager(1)
        await running.start(manager, attrs(1))
        await manager.update(attrs(7))
        assert manager.own.held is not None
        kv = await etcd.client.get(f"{etcd.prefix}/subnets/10.5.2.0-24")
        assert kv is not None
        assert (kv.lease, kv.value) == (0, encode_attrs(attrs(7)))


async def test_later_configurations_are_told(etcd: EtcdWorld) -> None:
    """Each once, what is wrong with them too; a compaction in between and a deletion do not matter."""
    manager = etcd.manager(1)
    assert (await manager.network_config()).backend.type == "vxlan"
    lease = await manager.acquire(attrs(1))
    waiting = asyncio.create_task(manager.next_config())
    await etcd.configure()  # the same words
    await etcd.client.delete(f"{etcd.prefix}/config")
    page = await etcd.client.read(f"{etcd.prefix}/config")
    await etcd.client.compact(page.header.revision)
    await etcd.configure(CONFIG.replace(b"vxlan", b"host-gw"))
    async with asyncio.timeout(10):
        config = await waiting
        assert config.backend.type == "host-gw"
        assert manager.suits(config)
        await etcd.configure(b'{"Network":"10.9.0.0/22","SubnetLen":24,"Backend":{"Type":"vxlan"}}')
        assert not manager.suits(await manager.next_config()), f"{lease.node} is none of 10.9.0.0/22"
        await etcd.configure(b"{")
        with pytest.raises(InvalidInput, match="is not JSON"):
            await manager.next_config()
        await etcd.configure()
        assert (await manager.next_config()).backend.type == "vxlan"


async def test_a_configuration_file_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("podwire.agent.subnets.kube.REREAD_SECONDS", 0.01)
    path = tmp_path / "net-conf.json"
    path.write_bytes(CONFIG)
    async with memory_cluster(tmp_path / "cluster") as cluster:
        nodes = Informer(cluster.client, NODES, Node)
        manager = KubeSubnets(
            nodes,
            "m1",
            parse_net_config(CONFIG, leased=False),
            reread=lambda: parse_net_config(path.read_bytes(), leased=False),
        )
        waiting = asyncio.create_task(manager.next_config())
        path.write_bytes(CONFIG.replace(b"vxlan", b"host-gw"))
        async with asyncio.timeout(10):
            assert (await waiting).backend.type == "host-gw"
            path.write_bytes(b"{")
            with pytest.raises(InvalidInput):
                await manager.next_config()
            path.write_bytes(CONFIG.replace(b"vxlan", b"host-gw"))
            assert (await manager.next_config()).backend.type == "host-gw", "the good one again, though it is the former"


async def test_a_user_who_may_touch_the_prefix_alone(tmp_path: Path) -> None:
    """etcd's authentication, with a role that has flannel's keys and no others."""
    prefix = "/coreos.com/network"
    async with one_member(tmp_path) as member, Running() as running:
        async with EtcdClient([member.client_url]) as root:
            await answers(root)
            await root.put(f"{prefix}/config", CONFIG)
            calls: list[tuple[str, dict[str, Any]]] = [
                ("auth/role/add", {"name": "nodes"}),
                ("auth/role/grant", {"name": "nodes", "perm": {"permType": "READWRITE"} | _range(prefix)}),
                ("auth/user/add", {"name": "node", "password": "secret"}),
                ("auth/user/grant", {"user": "node", "role": "nodes"}),
                ("auth/user/add", {"name": "root", "password": "other"}),
                ("auth/user/grant", {"user": "root", "role": "root"}),
                ("auth/enable", {}),
            ]
            for path, document in calls:
                await root.call(path, document)
        async with EtcdClient([member.client_url], user=("node", "secret")) as client:
            manager, peer = (EtcdSubnets(client, prefix=prefix, ttl=TTL, margin=1) for _ in range(2))
            await running.start(manager, attrs(1))
            listener = await running.start(peer, attrs(2))
            await until(lambda: manager.counters.renewed > 1)
            assert list(listener.peers.values()) == [manager.own.lease]
            with pytest.raises(EtcdDenied):
                await client.put("elsewhere", b"")
            await running.stop()
            await running.stop()


def _range(prefix: str) -> dict[str, str]:
    """All keys below the prefix, as etcd's JSON has a range."""
    ends = {"key": f"{prefix}/", "range_end": f"{prefix}0"}
    return {name: base64.b64encode(text.encode()).decode() for name, text in ends.items()}


async def test_a_watch_that_fell_behind_a_compaction_starts_again_from_a_list(etcd: EtcdWorld) -> None:
    manager = etcd.manager(1)
    listener = Listener()
    manager.subscribe(listener)
    await manager.acquire(attrs(1))
    await etcd.put("10.5.3.0-24" if manager.own.lease and "10.5.1" in manager.own.lease.node else "10.5.1.0-24", attrs(9))
    page = await etcd.client.read(f"{etcd.prefix}/config")
    await etcd.client.put(f"{etcd.prefix}/config", CONFIG)
    await etcd.client.compact(page.header.revision + 1)
    running = asyncio.create_task(manager.run())
    await until(lambda: len(listener.peers) == 1)
    assert manager.counters.relists == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
