"""Takes away what a kube-proxy that ran on this node has left: its rules would go on leading to endpoints of its last day."""

import logging

from podwire.agent.proxymodes.nft import remove_tables
from podwire.kernel.iptables import Flavour, IptablesClient, NotInKernel, find_programs
from podwire.kernel.netns import off_loop_to_the_end
from podwire.kernel.port import Kernel
from podwire.plan.kubeproxy import IPVS_DEVICE, NFT_TABLE, removal

log = logging.getLogger(__name__)


async def remove_kube_proxy(kernel: Kernel, netns_fd: int) -> tuple[str, ...]:
    """What its modes iptables (either flavour) and nftables left. Tracked connections go on. Returns what was found, in words.
    Raises KernelError."""
    found = []
    if await remove_tables(kernel, NFT_TABLE):
        found.append("nftables")
    for flavour in Flavour:
        programs = find_programs(flavour)
        if programs is None:
            continue
        client = IptablesClient(netns_fd, programs)
        chains = await off_loop_to_the_end(lambda client=client: _remove(client))  # type: ignore[misc]
        if chains:
            found.append(f"iptables ({flavour}): {chains} chains")
    if IPVS_DEVICE in (await kernel.observe()).links:
        log.warning("kube-proxy's IPVS servers are left as they are: remove them with `kube-proxy --cleanup`, or reboot")
    return tuple(found)


def _remove(client: IptablesClient) -> int:
    """How many chains it took away, of all families."""
    total = 0
    for family in client.families:
        try:
            text, chains = removal(client.save(family))
        except NotInKernel:
            continue
        if text:
            client.restore(family, text)
            total += chains
    return total
