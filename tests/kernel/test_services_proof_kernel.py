"""The proof in a real kernel: what is promised is what the rules read back would do, and what becomes of real packets, in each
back end."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
import pytest_asyncio
from promiserig import broken_promises, prepare
from service_proof import Walk, disagreements
from service_worlds import change_to, some_clusters
from servicerig import FACTS, ServiceRig, service_rig

from podwire.agent.proxymodes.iptables import IptablesRules, observe
from podwire.agent.proxymodes.nft import NftRules, remove_tables
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, IptablesClient, find_programs
from podwire.model.addr import Family
from podwire.plan.services import TABLE
from podwire.trace import iptables, netfilter
from podwire.trace.oracle import Outcome

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[ServiceRig]:
    async with service_rig() as made:
        await prepare(made)
        yield made


def _iptables(flavour: Flavour, rig: ServiceRig) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.fds["node"], FACTS, flavour=flavour)


BACK_ENDS: dict[str, Callable[[ServiceRig], ServiceRules]] = {
    "nftables": lambda rig: NftRules(rig.kernel, FACTS),
    "iptables-nft": partial(_iptables, Flavour.NFT),
    "iptables-legacy": partial(_iptables, Flavour.LEGACY),
}


async def _held_by_nftables(rig: ServiceRig) -> Walk:
    return partial(netfilter.follow, await rig.kernel.observe_nft(TABLE))


async def _held_by_iptables(flavour: Flavour, rig: ServiceRig) -> Walk:
    programs = find_programs(flavour)
    assert programs is not None
    return partial(iptables.follow, observe(IptablesClient(rig.fds["node"], programs)))


HELD: dict[str, Callable[[ServiceRig], Awaitable[Walk]]] = {
    "nftables": _held_by_nftables,
    "iptables-nft": partial(_held_by_iptables, Flavour.NFT),
    "iptables-legacy": partial(_held_by_iptables, Flavour.LEGACY),
}


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_rules_read_back_keep_every_promise(rig: ServiceRig, family: Family, back_end: str) -> None:
    await remove_tables(rig.kernel, TABLE)
    rules, before = BACK_ENDS[back_end](rig), None
    for cluster in some_clusters(family, 8):
        change_to(rules, before, cluster)
        rules.set_facts(cluster.node)
        await rules.compare()
        before = cluster
        found = list(disagreements(cluster, await HELD[back_end](rig)))
        assert not found, "\n".join(found)


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_real_packets_meet_what_is_promised(rig: ServiceRig, family: Family, back_end: str) -> None:
    await remove_tables(rig.kernel, TABLE)
    rules = BACK_ENDS[back_end](rig)
    await rules.compare()
    wrong, tried = await broken_promises(rig, rules, some_clusters(family, 6, real=True))
    assert not wrong, "\n".join(wrong)
    assert min(tried[kind] for kind in (Outcome.SERVED, Outcome.REFUSED, Outcome.DROPPED)) > 10, tried
