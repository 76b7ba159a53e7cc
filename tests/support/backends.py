"""The back ends of Services that a rig of namespaces can have, by name."""

from collections.abc import Callable
from functools import partial

import pytest
from packetrig import PacketRig

from podwire.agent.proxymodes.iptables import IptablesRules
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, find_programs
from podwire.model.servicetable import NodeFacts

MakeHere = Callable[[PacketRig, NodeFacts], ServiceRules]


def _iptables(flavour: Flavour, rig: PacketRig, facts: NodeFacts) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.node, facts, flavour=flavour)


BACK_ENDS: dict[str, MakeHere] = {
    "nftables": lambda rig, facts: NftRules(rig.kernel, facts),
    "iptables-nft": partial(_iptables, Flavour.NFT),
    "iptables-legacy": partial(_iptables, Flavour.LEGACY),
}
