"""Which back end a node uses, and what the others have left behind."""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

from podwire.agent.localnet import withdraw
from podwire.agent.proxymodes import iptables, ipvs, nft
from podwire.agent.proxymodes.port import MakeRules, ServiceRules
from podwire.kernel.iptables import Flavour, IptablesClient, NotInKernel, Programs, find_programs
from podwire.kernel.netns import off_loop, off_loop_to_the_end
from podwire.kernel.port import Kernel, KernelError
from podwire.model.errors import Unsupported
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import NodeFacts
from podwire.plan.iptables import served
from podwire.plan.iptables_rules import MASQUERADE_BIT
from podwire.plan.ipvs import TABLE as IPVS_TABLE
from podwire.plan.services import TABLE

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeOptions:
    """What single back ends can be told. `flavour` None: the iptables flavour that the host uses. `drop_invalid`: in iptables,
    of no known connection. `scheduler`, `strict_arp`: kube-proxy's --ipvs-scheduler and --ipvs-strict-arp."""

    flavour: Flavour | None = None
    masquerade_bit: int = MASQUERADE_BIT
    drop_invalid: bool = True
    scheduler: str = "rr"
    strict_arp: bool = False


@dataclass(frozen=True, slots=True)
class ProxyModes:
    """The back ends of one node: its kernel port, and its namespace for what that has no operations for.

    `netns_fd` stays the caller's, to keep open as long as any rules made here are in use."""

    kernel: Kernel
    netns_fd: int
    options: ModeOptions = field(default_factory=ModeOptions)

    def make(self, mode: ProxyMode) -> MakeRules:
        """For `ServiceSync`: how to make that back end."""

        options = self.options

        def make(facts: NodeFacts) -> ServiceRules:
            match mode:
                case ProxyMode.NFTABLES:
                    return nft.NftRules(self.kernel, facts)
                case ProxyMode.IPTABLES:
                    return iptables.IptablesRules(
                        self.netns_fd,
                        facts,
                        flavour=options.flavour,
                        masquerade_bit=options.masquerade_bit,
                        drop_invalid=options.drop_invalid,
                    )
                case ProxyMode.IPVS:
                    return ipvs.IpvsRules(
                        self.kernel, self.netns_fd, facts, scheduler=options.scheduler, strict_arp=options.strict_arp
                    )

        return make

    async def say_who_drops(self, mode: ProxyMode) -> None:
        """A line in the log for each flavour of iptables whose policy is to drop what is forwarded. Only its own rules can make
        an exception: those of `mode` do in its own flavour if they are iptables, and else cannot."""
        for flavour in Flavour:
            programs = find_programs(flavour)
            if programs is None or mode is ProxyMode.IPTABLES:
                continue
            client = IptablesClient(self.netns_fd, programs)
            with contextlib.suppress(KernelError):
                texts = await off_loop(lambda client=client: [client.save(family) for family in client.families])  # type: ignore[misc]
                if any(line.startswith(":FORWARD DROP ") for text in texts for line in text.splitlines()):
                    log.warning(
                        "iptables (%s) drops what is forwarded, connections to Services too, and no rule of %s can let them "
                        "pass: set its FORWARD policy to ACCEPT, or use --proxy-mode iptables",
                        flavour,
                        mode,
                    )

    async def served_by_others(self, used: ServiceRules) -> frozenset[bytes]:
        """The keys (`services_maps.frontend_key`) of all frontends that back ends other than `used` have in the kernel. What of
        them cannot be read is left out, and said."""
        keys: set[bytes] = set()
        for other in self._others(used):
            try:
                keys.update(await other.served())
            except (KernelError, Unsupported) as error:
                log.warning("what %s served here is not known, so UDP connections of then may stay: %s", other.name, error)
        return frozenset(keys)

    async def clean_up(self, used: ServiceRules | None = None) -> tuple[str, ...]:
        """Take what other back ends than `used` have left out of the kernel; None: everything of all, at once. Tracked
        connections go on; those of IPVS are waited for with `used`, and else cut. Returns what was found, in words. Raises
        KernelError where something stays."""
        if used is None:
            await withdraw(self.kernel)
        found: list[str] = []
        failed: list[str] = []
        for other in self._others(used):
            try:
                if await other.remove():
                    found.append(other.name)
            except (KernelError, Unsupported) as error:
                failed.append(f"{other.name} ({error})")
        if found:
            log.info("removed what other proxy modes had left: %s", ", ".join(found))
        if failed:
            raise KernelError(f"rules of Services are still there, of {'; '.join(failed)}")
        return tuple(found)

    def _others(self, used: ServiceRules | None) -> Iterator["_Other"]:
        """The back ends that are not in use."""
        if not isinstance(used, nft.NftRules):
            yield _Other("nftables", partial(self._served_by_table, TABLE), lambda: nft.remove_tables(self.kernel, TABLE))
        if not isinstance(used, ipvs.IpvsRules):
            yield _Other("ipvs", partial(self._served_by_table, IPVS_TABLE), lambda: self._remove_ipvs(at_once=used is None))
        keep = used.flavour if isinstance(used, iptables.IptablesRules) else None
        for flavour in Flavour:
            programs = find_programs(flavour)
            if programs is not None and flavour is not keep:
                yield _Other(
                    f"iptables ({flavour})",
                    partial(self._served_by_iptables, programs),
                    partial(self._remove_iptables, programs),
                )

    async def _served_by_table(self, name: str) -> Collection[bytes]:
        return (await nft.count_connections(self.kernel, name, endpoints=False)).frontends.keys()

    async def _served_by_iptables(self, programs: Programs) -> Collection[bytes]:
        client = IptablesClient(self.netns_fd, programs)
        try:
            return served(await off_loop(lambda: iptables.observe(client)))
        except NotInKernel:
            return ()

    async def _remove_ipvs(self, *, at_once: bool) -> bool:
        left = await ipvs.left_behind(self.kernel, self.netns_fd)
        if left is not None:
            await left.remove(at_once=at_once)
        return left is not None

    async def _remove_iptables(self, programs: Programs) -> bool:
        client = IptablesClient(self.netns_fd, programs)
        try:
            return bool(await off_loop_to_the_end(lambda: iptables.remove(client)))
        except NotInKernel:
            return False


@dataclass(frozen=True, slots=True)
class _Other:
    """A back end that is not in use: what it serves, and how to remove it, which returns whether there was anything."""

    name: str
    served: Callable[[], Awaitable[Collection[bytes]]]
    remove: Callable[[], Awaitable[bool]]
