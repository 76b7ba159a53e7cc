"""Whom the kernel remembers where: never at an endpoint that has left, whatever was on its way and however an agent ended."""

import ipaddress
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from servicerig import FACTS, ServiceRig, pick, service_rig

from podwire.agent.proxymodes.nft import NftRules
from podwire.kernel.nftclient import NftClient
from podwire.kernel.rtnlsocket import open_netlink
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.nft import AddElements, Batch, Command, DelElements, Prune, TableRef
from podwire.model.objects import EndpointSlice, Service
from podwire.model.ops import CommitNft
from podwire.plan.services import TABLE
from podwire.plan.services_rules import sets_of
from podwire.wire.netlink import NETLINK_NETFILTER
from podwire.wire.nftables import Unit

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

both = pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
WEB = ObjectKey("shop", "web")


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[ServiceRig]:
    async with service_rig() as made:
        yield made


def address(family: Family, pod: int) -> str:
    return pick(family, f"10.244.1.{pod}", f"fd00:10:244:1::{pod}")


def backend(family: Family, pod: int) -> bytes:
    return ipaddress.ip_address(address(family, pod)).packed + b"\x1f\x90\0\0"


def cluster_ip(family: Family) -> str:
    return pick(family, "10.96.0.10", "fd00:10:96::a")


def sticky(family: Family, *pods: int) -> tuple[Service, tuple[EndpointSlice]]:
    service: dict[str, Any] = {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "clusterIP": cluster_ip(family),
            "ipFamilies": [family.value],
            "ports": [{"port": 80, "protocol": "TCP"}],
            "sessionAffinity": "ClientIP",
        },
    }
    pieces: dict[str, Any] = {
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family.value,
        "endpoints": [{"addresses": [address(family, n)], "nodeName": "n1"} for n in pods],
        "ports": [{"port": 8080, "protocol": "TCP"}],
    }
    return msgspec.convert(service, Service), (msgspec.convert(pieces, EndpointSlice),)


async def execute(rig: ServiceRig, *commands: Command) -> None:
    applied = await rig.kernel.apply((CommitNft(Batch(commands)),))
    assert applied.ok, applied.failures


async def remembered(rig: ServiceRig, family: Family) -> list[object]:
    """At which backends."""
    found = await rig.kernel.count_nft(TableRef(family, TABLE), sets_of(family).affinity)
    return [data for data, _ in found.values()]


@both
async def test_what_was_on_its_way_to_an_endpoint_that_left_does_not_bring_it_back(rig: ServiceRig, family: Family) -> None:
    """A packet that the former rules have rewritten meets the present ones on its way out: they know the endpoint no more."""
    rig.planner.set_service(WEB, *sticky(family, 2))
    await rig.program()
    members = rig.planner.desired().tables[TableRef(family, TABLE)].sets["members"]
    await execute(rig, DelElements(TableRef(family, TABLE), members.set, tuple(members.elements.items())))
    assert (await rig.ask("p4", cluster_ip(family), 80))[0] == "p2"
    assert await remembered(rig, family) == []
    await execute(rig, AddElements(TableRef(family, TABLE), members.set, tuple(members.elements.items())))
    assert (await rig.ask("p4", cluster_ip(family), 80))[0] == "p2"
    assert await remembered(rig, family) == [backend(family, 2)]


@both
async def test_an_agent_that_takes_over_forgets_who_left_though_the_rules_are_right(rig: ServiceRig, family: Family) -> None:
    rules = NftRules(rig.kernel, FACTS)
    rules.set_service(WEB, *sticky(family, 2))
    await rules.compare()
    assert (await rig.ask("p4", cluster_ip(family), 80))[0] == "p2"
    await execute(rig, await left_at(rig, family, 3))
    assert await rules.compare() == 0
    assert await remembered(rig, family) == [backend(family, 3)], "as an agent leaves it that ends before it swept"
    after = NftRules(rig.kernel, FACTS)
    after.set_service(WEB, *sticky(family, 2))
    assert await after.compare() == 0, "no repair"
    assert await remembered(rig, family) == []
    assert (await rig.ask("p4", cluster_ip(family), 80))[0] == "p2"
    assert await remembered(rig, family) == [backend(family, 2)]


async def left_at(rig: ServiceRig, family: Family, pod: int) -> AddElements:
    """The only client, made to be remembered at another pod."""
    table, affinity = TableRef(family, TABLE), sets_of(family).affinity
    ((client, _),) = (await rig.kernel.count_nft(table, affinity)).items()
    await execute(rig, DelElements(table, affinity, ((client, None),)))
    return AddElements(table, affinity, ((client, backend(family, pod)),))


class Late(NftClient):
    """After what it deletes, it comes back so many times."""

    def __init__(self, sock: socket.socket, back: Command, times: int) -> None:
        super().__init__(sock)
        self.back, self.times = back, times

    def _transact(self, units: Sequence[Unit]) -> None:
        super()._transact(units)
        if self.times and any(isinstance(unit.command, DelElements) for unit in units):
            self.times -= 1
            self.commit(Batch((self.back,)))


@pytest.mark.parametrize(("times", "left"), [(1, 0), (50, 1)], ids=["in flight", "for ever"])
async def test_what_comes_back_is_taken_away_again_but_not_for_ever(rig: ServiceRig, times: int, left: int) -> None:
    table, affinity = TableRef(Family.IPV4, TABLE), sets_of(Family.IPV4).affinity
    back = AddElements(table, affinity, ((bytes((10, 244, 1, 4, 0, 0, 0, 1)), backend(Family.IPV4, 3)),))
    await execute(rig, back)
    with open_netlink(rig.fds["node"], NETLINK_NETFILTER) as sock:
        client = Late(sock, back, times)
        client.commit(Batch((Prune(table, affinity, 4, {}, others=True),)))
        assert len(client.elements(table, affinity.name)) == left
