"""Which back end a node uses, and what the others have left behind."""

import logging
from dataclasses import dataclass, field

from podwire.agent.proxymodes import iptables, ipvs, nft
from podwire.agent.proxymodes.port import MakeRules, ServiceRules
from podwire.kernel.iptables import Flavour, IptablesClient, find_programs
from podwire.kernel.netns import off_loop_to_the_end
from podwire.kernel.port import Kernel, KernelError
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import NodeFacts
from podwire.plan.iptables_rules import MASQUERADE_BIT
from podwire.plan.services import TABLE

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeOptions:
    """What single back ends can be told. `flavour` None: the iptables flavour that the host uses. `scheduler`, `strict_arp`:
    kube-proxy's --ipvs-scheduler and --ipvs-strict-arp."""

    flavour: Flavour | None = None
    masquerade_bit: int = MASQUERADE_BIT
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
                        self.netns_fd, facts, flavour=options.flavour, masquerade_bit=options.masquerade_bit
                    )
                case ProxyMode.IPVS:
                    return ipvs.IpvsRules(
                        self.kernel, self.netns_fd, facts, scheduler=options.scheduler, strict_arp=options.strict_arp
                    )

        return make

    async def clean_up(self, used: ServiceRules | None = None) -> tuple[str, ...]:
        """Take what other back ends than `used` have left out of the kernel; None: everything of all, at once. Tracked
        connections go on; those of IPVS are waited for with `used`, and else cut. Returns what was found, in words. Raises
        KernelError where something stays."""
        found = []
        if not isinstance(used, nft.NftRules) and await nft.remove_tables(self.kernel, TABLE):
            found.append("nftables")
        if not isinstance(used, ipvs.IpvsRules) and (left := await ipvs.left_behind(self.kernel, self.netns_fd)):
            await left.remove(at_once=used is None)
            found.append("ipvs")
        keep = used.flavour if isinstance(used, iptables.IptablesRules) else None
        for flavour in Flavour:
            programs = find_programs(flavour)
            if programs is None or flavour is keep:
                continue
            client = IptablesClient(self.netns_fd, programs)
            try:
                if await off_loop_to_the_end(lambda client=client: iptables.remove(client)):  # type: ignore[misc]
                    found.append(f"iptables ({flavour})")
            except KernelError as error:
                # A kernel without that flavour has no rules in it.
                log.debug("iptables (%s) cannot be looked at: %s", flavour, error)
        if found:
            log.info("removed what other proxy modes had left: %s", ", ".join(found))
        return tuple(found)
