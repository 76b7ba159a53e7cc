"""The case files of changes with real packets, in each back end: what new connections meet after each change, and that those
which are open go on through all of them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing

import pytest
import pytest_asyncio
from backends import BACK_ENDS
from packetrig import Conversation, PacketRig, packet_rig, sendable
from service_cases import feed
from service_histories import ChangeCase, load_change_cases

from podwire.agent.proxymodes.port import ServiceRules
from podwire.model.addr import Family
from podwire.model.nft import AddChain, AddTable, BaseHook, Batch, Chain, Command, Hook, Rule, SetRules, TableRef
from podwire.model.nftexpr import Ct, CtKey
from podwire.model.ops import CommitNft

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.timeout(90),
]


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[PacketRig]:
    """With a stranger's chains, as a kubelet or an engine has them: the kernel translates while anybody may want it to."""
    async with packet_rig() as made:
        applied = await made.kernel.apply((CommitNft(Batch(tuple(_stranger()))),))
        assert applied.ok, applied.failures
        yield made


def _stranger() -> Iterator[Command]:
    for family in Family:
        table = TableRef(family, "stranger")
        yield AddTable(table)
        for hook, priority in ((Hook.PREROUTING, -90), (Hook.OUTPUT, -90), (Hook.POSTROUTING, 110)):
            chain = Chain(hook.name.lower(), BaseHook("nat", hook, priority))
            yield AddChain(table, chain)
            yield SetRules(table, chain.name, (Rule((Ct(CtKey.STATUS, 8),)),))  # without such, nothing is tracked


async def failures(rig: PacketRig, rules: ServiceRules, case: ChangeCase) -> list[str]:
    found = []
    talks: dict[str, Conversation] = {}
    with ExitStack() as stack:
        await rules.compare()
        for number, change in enumerate(case.changes):
            for item in change.objects:
                feed(rules, item, case.family)
            await rules.program()
            where = f"{case.name}, change {number}"
            for expected in filter(sendable, change.packets):
                seen = rig.send(expected)
                if not rig.fits(expected, seen):
                    found.append(f"{where}: {expected.label}: {seen}, not {expected.fate}")
            for opened in change.opens:
                talks[f"{opened.label}, opened at {number}"] = stack.enter_context(closing(rig.connect(opened)))
            found += [f"{where}: {label} does not go on" for label, talk in talks.items() if not talk.goes_on()]
        await rules.remove()
        found += [f"{case.name}, rules removed: {label} does not go on" for label, talk in talks.items() if not talk.goes_on()]
    return found


@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_every_case(rig: PacketRig, back_end: str) -> None:
    found = []
    for case in load_change_cases():
        found += await failures(rig, BACK_ENDS[back_end](rig, case.facts), case)
    assert not found, "\n".join(found)
