"""What a node remembers of its network, for an agent that starts while nobody can be asked."""

import asyncio
import ipaddress
import json
import sqlite3
from collections.abc import AsyncIterator
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio
from cnirig import Outcome, config, environment, execute

from podwire.agent.memory import NetworkMemory, Remembered
from podwire.agent.nodeoverlay import Overlay
from podwire.agent.reservations import Reservations
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.port import Holding, OwnLease
from podwire.model.addr import Family
from podwire.model.cni import NOT_AVAILABLE
from podwire.plan.backends import Underlay, make_backend
from podwire.plan.leases import Lease, LeaseAttrs
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient, Link
from podwire.testing.memorycluster import MemoryCluster

ONE, OTHER = ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("10.244.2.0/24")


class Book:
    """The record on disk, and a clock."""

    def __init__(self, directory: Path) -> None:
        self.reservations = Reservations(directory / "reservations.db")
        self.now = 1000.0
        self.own = OwnLease()
        self._followed: asyncio.Task[None] | None = None

    def memory(self, boot: str = "boot-1") -> NetworkMemory:
        return NetworkMemory(self.reservations, boot, lambda: self.now)

    def holds(self, until: float = inf, subnet: Any = ONE) -> None:
        self.own = OwnLease(Lease("n1", (subnet,), LeaseAttrs()), Holding.HELD, until=until)

    def lapses(self) -> None:
        self.own = OwnLease(self.own.lease, Holding.LAPSED, "its Node was deleted")

    async def follow(self) -> None:
        """Until what is held now is on disk."""
        memory = self.memory()
        task = asyncio.create_task(memory.follow(lambda: self.own, 1450))
        before = self.reservations.remembered
        async with asyncio.timeout(5):
            while True:
                if self.reservations.remembered != before:
                    break
                await asyncio.sleep(0)
        task.cancel()

    async def write(self, **record: Any) -> None:
        await self.reservations.remember(json.dumps(record).encode())


@pytest_asyncio.fixture
async def book(tmp_path: Path) -> AsyncIterator[Book]:
    made = Book(tmp_path)
    yield made
    made.reservations.close()


async def test_nothing_is_remembered_at_first(book: Book) -> None:
    assert book.memory().recall() is None


async def test_a_hold_without_end_outlives_reboots_until_it_lapses(book: Book) -> None:
    book.holds()
    await book.follow()
    assert book.memory().recall() == book.memory("boot-2").recall() == Remembered((ONE,), 1450)
    book.lapses()
    await book.follow()
    assert book.memory().recall() is None


async def test_a_lease_is_good_until_its_end_and_in_its_boot(book: Book) -> None:
    book.holds(until=2000.0)
    await book.follow()
    book.now = 1999.0
    remembered = book.memory().recall()
    assert remembered == Remembered((ONE,), 1450, 2000.0)
    assert book.memory("boot-2").recall() is None, "nobody knows how long the machine was off"
    book.now = 2000.0
    assert book.memory().recall() is None
    assert "run out" in book.memory().withheld(remembered, OwnLease(why="etcd does not answer"))
    book.now = 1000.0
    book.holds(until=3000.0)
    await book.follow()
    renewed = book.memory().recall()
    assert renewed is not None
    assert renewed.until == 3000.0


async def test_it_survives_the_agent(book: Book, tmp_path: Path) -> None:
    book.holds()
    await book.follow()
    book.reservations.close()
    book.reservations = Reservations(tmp_path / "reservations.db")
    assert book.memory().recall() == Remembered((ONE,), 1450)
    await book.memory().forget()
    book.reservations.close()
    book.reservations = Reservations(tmp_path / "reservations.db")
    assert book.memory().recall() is None


NOBODY = OwnLease(why="etcd does not answer")
REVOKED = OwnLease(Lease("n1", (ONE,), LeaseAttrs()), Holding.LAPSED, "it was revoked")


@pytest.mark.parametrize(
    ("until", "own", "why"),
    [
        (inf, OwnLease(), ""),
        (inf, OwnLease(why="its Node is not in the API"), "its Node is not in the API"),
        (inf, OwnLease(Lease("n1", (ONE,), LeaseAttrs()), Holding.HELD), ""),
        (inf, OwnLease(Lease("n1", (OTHER,), LeaseAttrs()), Holding.HELD), "it has other subnets now"),
        (2000.0, NOBODY, ""),
        (900.0, NOBODY, "its lease has run out, and nobody could be asked"),
        (2000.0, REVOKED, "it was revoked"),
    ],
)
async def test_when_addresses_are_withheld(book: Book, until: float, own: OwnLease, why: str) -> None:
    assert book.memory().withheld(Remembered((ONE,), 1450, until), own) == why


@pytest.mark.parametrize(
    "record",
    [
        {"subnets": ["10.244.1.0/24"]},
        {"subnets": ["10.244.1.7/24"], "mtu": 1450, "boot": "b"},
        {"subnets": ["10.244.1.0/24", "10.244.2.0/24"], "mtu": 1450, "boot": "b"},
        {"subnets": [], "mtu": 1450, "boot": "b"},
        {"subnets": ["10.244.1.0/24"], "mtu": 0, "boot": "b"},
        {"subnets": ["10.244.1.0/24"], "mtu": 1450, "boot": "b", "until": "soon"},
    ],
)
async def test_what_makes_no_sense_is_not_believed(book: Book, record: dict[str, Any]) -> None:
    await book.write(**record)
    assert book.memory().recall() is None


async def test_a_full_disk_is_outlived(book: Book, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    book.holds()
    await book.follow()

    def full(statements: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(book.reservations, "_transact", full)
    await book.memory().forget()
    assert "cannot be written to disk" in caplog.text


async def test_a_leased_subnet_is_used_without_etcd_until_its_lease_ends(cluster: MemoryCluster, tmp_path: Path) -> None:
    """Three lives of an agent: one that leases, one that begins while etcd is away, and one that begins after the end."""
    server, link = FakeEtcd(), Link(timeout=0.05, silence=0.05)
    await FakeEtcdClient(server).put("/net/config", b'{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}')
    socket = tmp_path / "cni.sock"
    machine = cluster.machine(1, (Family.IPV4,), cni_socket=socket, patience_seconds=0.05)
    ips = machine.config.node_ips
    underlay = Underlay(device="eth0", mtu=1500, interfaces=(ipaddress.ip_interface(f"{ips[0]}/15"),), public=ips)
    overlay = Overlay(
        subnets=lambda _: EtcdSubnets(FakeEtcdClient(server, link), prefix="/net", ttl=5, margin=2, rng=Random(1)),
        backend=lambda network: make_backend(network, underlay, "n1"),
    )
    async with cluster.agent(machine, overlay=overlay):
        assert (await status(socket)).status == 0
    link.up = False
    async with cluster.agent(machine, overlay=overlay, subnets=False) as agent:
        await cluster.until(lambda: "subnets" in agent.status().degraded)
        assert (await status(socket)).status == 0

        async def withheld() -> bool:
            return (await status(socket)).code == NOT_AVAILABLE

        await cluster.until(withheld)
        assert "run out" in (await status(socket)).document["details"]
    async with cluster.agent(machine, overlay=overlay, subnets=False):

        async def without_subnet() -> bool:
            return "no subnet yet" in (await status(socket)).document["msg"]

        await cluster.until(without_subnet)


async def status(socket: Path) -> Outcome:
    return await execute(environment(socket, "STATUS"), config())
