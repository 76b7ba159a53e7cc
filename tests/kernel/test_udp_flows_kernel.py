"""The case files of tracked UDP connections, with the kernel's own: packets make them under the rules of before, and those go
that the change makes stale."""

from collections import defaultdict
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from packetrig import PacketRig, packet_rig
from service_histories import FlowCase, TrackedFlow, changed, load_flow_cases

from podwire.kernel.conntrack import read_flows
from podwire.model.flow import FlowTuple

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6", "conntrack over netlink"),
    pytest.mark.timeout(90),
]

Way = tuple[object, ...]
_TRIES = 60
"""With two endpoints one of them is missed so often once in 10^18 times."""


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[PacketRig]:
    async with packet_rig() as made:
        yield made


async def tracked(rig: PacketRig) -> dict[Way, set[FlowTuple]]:
    """The kernel's connections by everything but the client's port and address (a node's process has several)."""
    found: dict[Way, set[FlowTuple]] = defaultdict(set)
    for flow in await read_flows(rig.node):
        way = flow.original.dst, flow.original.protocol, flow.original.dport, flow.reply.src, flow.reply.sport
        found[way].add(flow.original)
    return found


def way_of(flow: TrackedFlow) -> Way:
    there, back = flow.tuples(0)
    return there.dst, there.protocol, there.dport, back.src, back.sport


def make(rig: PacketRig, flow: TrackedFlow) -> None:
    """Send until the kernel draws the case's endpoint."""
    wanted = flow.endpoint or (str(flow.sent.packet.dst), flow.sent.packet.dport)
    for _ in range(_TRIES):
        if rig.send(flow.sent).reached == wanted:
            return
    pytest.fail(f"{flow.label} was not made")


async def wrong(rig: PacketRig, case: FlowCase) -> list[str]:
    """What the kernel forgot or kept against the case's word."""
    made: dict[Way, set[FlowTuple]] = {}

    async def make_flows() -> None:
        for flow in case.flows:
            make(rig, flow)
        made.update(await tracked(rig))

    async with changed(rig.kernel, case, make_flows):
        left = await tracked(rig)
    found = []
    for flow in case.flows:
        mine = {t for t in made[way_of(flow)] if flow.sent.locally_made or t.src == flow.sent.packet.src}
        assert mine, f"{flow.label} is not tracked"
        remaining = mine & left.get(way_of(flow), set())
        if remaining != (set() if flow.forgotten else mine):
            found.append(f"{flow.label}: {len(remaining)} of {len(mine)} left")
    return found


@pytest.mark.parametrize("case", list(load_flow_cases()), ids=lambda case: case.name)
async def test_what_the_change_makes_be_forgotten(rig: PacketRig, case: FlowCase) -> None:
    found = await wrong(rig, case)
    assert not found, "\n".join(found)
