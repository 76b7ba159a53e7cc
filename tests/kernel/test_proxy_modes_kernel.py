"""Every back end gives the same verdict for the same packet: the case files, with real packets, in each of them."""

import functools
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from packetrig import PacketRig, packet_rig, sendable
from service_cases import Case, load_cases

from podwire.agent.proxymodes.iptables import IptablesRules
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, find_programs
from podwire.model.servicetable import NodeFacts

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

MakeHere = Callable[[PacketRig, NodeFacts], ServiceRules]


def _iptables(flavour: Flavour, rig: PacketRig, facts: NodeFacts) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.node, facts, flavour=flavour)


BACK_ENDS: dict[str, MakeHere] = {
    "nftables": lambda rig, facts: NftRules(rig.kernel, facts),
    "iptables-nft": functools.partial(_iptables, Flavour.NFT),
    "iptables-legacy": functools.partial(_iptables, Flavour.LEGACY),
}


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[PacketRig]:
    async with packet_rig() as made:
        yield made


def failures(rig: PacketRig, case: Case) -> list[str]:
    found = []
    for expected in filter(sendable, case.packets):
        for _ in range(3 if len(expected.reaches) > 1 else 1):
            seen = rig.send(expected)
            if not rig.fits(expected, seen):
                found.append(f"{case.name}: {expected.label}: {seen}, not {expected.fate}")
    return found


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.timeout(90)
async def test_every_case(rig: PacketRig, back_end: str) -> None:
    wrong = []
    for case in load_cases(special=True):
        rules = BACK_ENDS[back_end](rig, case.facts)
        case.feed(rules)
        await rules.compare()
        wrong += failures(rig, case)
        assert await rules.compare() == 0, f"{case.name}: the rules read back are not those planned"
    await rules.remove()
    assert not wrong, "\n".join(wrong)
