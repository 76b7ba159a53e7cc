"""The proof in a real kernel: what is promised is what the rules read back would do, and what becomes of real packets, in each
back end."""

from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import pytest_asyncio
from promiserig import broken_promises, prepare, some_clusters
from service_worlds import change_to, disagreements
from servicerig import FACTS, ServiceRig, service_rig

from podwire.agent.proxymodes.iptables import IptablesRules
from podwire.agent.proxymodes.nft import NftRules, remove_tables
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, find_programs
from podwire.model.addr import Family
from podwire.model.ops import CommitNft
from podwire.plan.services import TABLE
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


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
async def test_rules_read_back_keep_every_promise(rig: ServiceRig, family: Family) -> None:
    before = None
    for cluster in some_clusters(family, 15, real=False):
        change_to(rig.planner, before, cluster)
        rig.planner.set_facts(cluster.node)
        await rig.kernel.apply((CommitNft(rig.planner.resync(await rig.kernel.observe_nft(TABLE))),))
        before = cluster
        observed = await rig.kernel.observe_nft(TABLE)
        assert not (found := disagreements(cluster, observed)), "\n".join(found)


def _iptables(flavour: Flavour, rig: ServiceRig) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.fds["node"], FACTS, flavour=flavour)


BACK_ENDS: dict[str, Callable[[ServiceRig], ServiceRules]] = {
    "nftables": lambda rig: NftRules(rig.kernel, FACTS),
    "iptables-nft": partial(_iptables, Flavour.NFT),
    "iptables-legacy": partial(_iptables, Flavour.LEGACY),
}


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_real_packets_meet_what_is_promised(rig: ServiceRig, family: Family, back_end: str) -> None:
    await remove_tables(rig.kernel, TABLE)
    rules = BACK_ENDS[back_end](rig)
    await rules.compare()
    wrong, tried = await broken_promises(rig, rules, some_clusters(family, 6, real=True))
    assert not wrong, "\n".join(wrong)
    assert min(tried[kind] for kind in (Outcome.SERVED, Outcome.REFUSED, Outcome.DROPPED)) > 10, tried
