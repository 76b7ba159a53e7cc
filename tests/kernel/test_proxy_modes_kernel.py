"""Every back end gives the same verdict for the same packet: the case files, with real packets, in each of them."""

import functools
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from packetrig import PacketRig, packet_rig
from service_cases import FACTS, Case, Expectation, load_cases

from podwire.agent.proxymodes.iptables import IptablesRules
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, find_programs

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

MakeHere = Callable[[PacketRig], ServiceRules]


def _iptables(flavour: Flavour, rig: PacketRig) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.node, FACTS, flavour=flavour)


BACK_ENDS: dict[str, MakeHere] = {
    "nftables": lambda rig: NftRules(rig.kernel, FACTS),
    "iptables-nft": functools.partial(_iptables, Flavour.NFT),
    "iptables-legacy": functools.partial(_iptables, Flavour.LEGACY),
}


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[PacketRig]:
    async with packet_rig() as made:
        yield made


def sendable(packet: Expectation) -> bool:
    """Marks do not pass from one namespace to the next, and multicast is not routed: only the evaluator can show those."""
    return not packet.packet.mark and not packet.packet.dst.is_multicast


def failures(rig: PacketRig, case: Case) -> list[str]:
    found = []
    for expected in filter(sendable, case.packets):
        for _ in range(3 if len(expected.reaches) > 1 else 1):
            seen = rig.send(expected)
            if not rig.fits(expected, seen):
                found.append(f"{case.name}: {expected.label}: {seen}, not {expected}")
    return found


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.timeout(90)
async def test_every_case(rig: PacketRig, back_end: str) -> None:
    wrong = []
    for case in load_cases():
        rules = BACK_ENDS[back_end](rig)
        case.feed(rules)
        await rules.compare()
        wrong += failures(rig, case)
        assert await rules.compare() == 0, f"{case.name}: the rules read back are not those planned"
    await rules.remove()
    assert not wrong, "\n".join(wrong)
