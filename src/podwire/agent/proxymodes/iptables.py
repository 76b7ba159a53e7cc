"""Services in iptables: `iptables-restore` is given the chains that changed, in the flavour that the host uses."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from podwire.agent.proxymodes.port import Connections, RuleCount
from podwire.kernel.iptables import Flavour, IptablesClient, TooLarge, choose_programs
from podwire.kernel.netns import off_loop, off_loop_to_the_end
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import Frontend, NodeFacts, ServiceTable
from podwire.plan.differences import chain_differences
from podwire.plan.iptables import Chains, IptablesPlanner, Restore, invalid_dropped, parse_save, restore, served
from podwire.plan.iptables_rules import FILTER, MASQUERADE_BIT, NAT

log = logging.getLogger(__name__)

_PART_LINES = 150
"""With 0.2 MB of buffer and up to 1.2 KB a rule."""

_LOOK_SECONDS = 0.5
"""How often legacy tables are asked for their size: the kernel does not tell when somebody changes them."""
AUDIT_SECONDS = 15.0
"""How often they are compared, for a rule may be replaced by one of the same size."""
_AUDIT_SHARE = 30
"""Where comparing takes long, so many times as long goes by before it is done again."""
_UNKNOWN = b"?"
"""A fingerprint that no tables have."""


class IptablesRules:
    """`ServiceRules` by `IptablesPlanner`, in the namespace behind `netns_fd`, which stays the caller's to keep open.

    `flavour` None: the one in use there. `masquerade_bit`: the packet mark, kube-proxy's --iptables-masquerade-bit.
    `drop_invalid`: drop forwarded packets of no known connection, as kube-proxy does unless it is to be liberal."""

    mode = ProxyMode.IPTABLES

    def __init__(
        self,
        netns_fd: int,
        facts: NodeFacts,
        *,
        flavour: Flavour | None = None,
        masquerade_bit: int = MASQUERADE_BIT,
        drop_invalid: bool = True,
    ) -> None:
        self._fd, self._wanted = netns_fd, flavour
        self._planner = IptablesPlanner(facts, masquerade_bit=masquerade_bit, drop_invalid=drop_invalid)
        self._client: IptablesClient | None = None
        self._opening = asyncio.Lock()
        self._fingerprint = b""
        self._compared_seconds = 0.0
        self.differences: Sequence[str] = ()
        self._written: dict[tuple[Family, str], int] = {}

    @property
    def flavour(self) -> Flavour | None:
        """The flavour in use; None before the first look at the kernel."""
        return self._client.flavour if self._client else None

    def set_facts(self, facts: NodeFacts) -> None:
        self._planner.set_facts(facts)

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        self._planner.set_service(key, service, slices)

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        self._planner.set_host_ports(uid, pod)

    def table(self, key: ObjectKey) -> ServiceTable:
        return self._planner.table(key)

    def served_at(self, key: bytes) -> Frontend | None:
        return self._planner.served_at(key)

    async def program(self) -> int:
        return await self._restore(self._planner.take())

    async def compare(self) -> int:
        client, loop = await self._opened(), asyncio.get_running_loop()
        began = loop.time()
        # From before reading: what is changed meanwhile is noticed.
        self._fingerprint = await off_loop(client.fingerprint)
        observed = await off_loop(lambda: observe(client))
        texts = self._planner.resync(observed)
        self.differences = chain_differences(texts)
        commands = await self._restore(texts)
        self._compared_seconds = loop.time() - began
        return commands

    async def served(self) -> Collection[bytes]:
        client = await self._opened()
        return served(await off_loop(lambda: observe(client)))

    async def changed(self) -> None:
        client, loop = await self._opened(), asyncio.get_running_loop()
        if client.flavour is Flavour.NFT:
            await loop.create_future()  # every change is announced
        audit = loop.time() + max(AUDIT_SECONDS, _AUDIT_SHARE * self._compared_seconds)
        while loop.time() < audit and await off_loop(client.fingerprint) == self._fingerprint:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)

    async def remove(self) -> None:
        client = await self._opened()
        await off_loop_to_the_end(lambda: remove(client))
        self._fingerprint = await off_loop(client.fingerprint)

    async def connections(self, *, endpoints: bool) -> Connections:
        client = await self._opened()
        texts = await off_loop(lambda: {family: client.count(family, NAT) for family in client.families})
        frontends, chosen = self._planner.counted(texts, endpoints=endpoints)
        if endpoints:
            return Connections(frontends, chosen)
        filters = await off_loop(lambda: [client.count(family, FILTER) for family in client.families])
        return Connections(frontends, chosen, invalid_dropped=sum(map(invalid_dropped, filters)))

    def rule_counts(self) -> Mapping[tuple[Family, str], RuleCount]:
        totals = self._planner.rule_counts()
        return {ref: RuleCount(total, self._written.get(ref, 0)) for ref, total in totals.items()}

    async def _restore(self, texts: Iterable[Restore]) -> int:
        client = await self._opened()
        texts = [text for text in texts if text.family in client.families]
        self._written = {(text.family, part.table): part.rules for text in texts for part in text.tables}
        if not texts:
            return 0
        touched = await off_loop(client.fingerprint) != self._fingerprint
        self._fingerprint = _UNKNOWN
        for text in texts:
            await off_loop_to_the_end(lambda text=text: carry_out(client, text))  # type: ignore[misc]
        if not touched:
            self._fingerprint = await off_loop(client.fingerprint)
        return sum(text.chains for text in texts)

    async def _opened(self) -> IptablesClient:
        async with self._opening:  # it is watched from the start
            if self._client is None:
                programs = await off_loop(lambda: choose_programs(self._fd, self._wanted))
                log.info("Services go through iptables, %s flavour", programs.flavour)
                self._client = IptablesClient(self._fd, programs)
            return self._client


def observe(client: IptablesClient) -> dict[Family, Chains]:
    """What the kernel holds of ours."""
    return {family: parse_save(client.save(family)) for family in client.families}


def carry_out(client: IptablesClient, wanted: Restore) -> None:
    """At once, or in parts where the kernel does not take it at once."""
    try:
        client.restore(wanted.family, wanted.text)
    except TooLarge:
        for part in wanted.parts(_PART_LINES):
            client.restore(wanted.family, part)


def remove(client: IptablesClient) -> int:
    """Take everything of ours out of the kernel. Returns how many chains that were."""
    count = 0
    for family, held in observe(client).items():
        text = restore(family, Chains(), held)
        if text is not None:
            carry_out(client, text)
            count += text.chains
    return count
