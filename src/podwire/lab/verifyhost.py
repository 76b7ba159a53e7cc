"""`podwire verify overlay` for this host: its kernel against the leases in its store, and packets to every peer."""

import asyncio
import os
from collections.abc import Mapping, Sequence

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import current_netns
from podwire.lab.overlayprobe import MtuResult, probe_mtu
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.kernelstate import NetState
from podwire.plan.leases import Lease
from podwire.trace.overlaycheck import (
    AGREED,
    FITTING,
    Finding,
    NodeView,
    check_own,
    check_uniqueness,
    check_ways,
    longest_route,
)

MOST_AT_ONCE = 64


async def verify_host(leases: Mapping[str, Lease], node: str = "") -> list[Finding]:
    """`leases`: all there are, by node. `node`: which is this host's; empty: the one with an address that this host has."""
    netns = current_netns()
    kernel = LinuxKernel(netns)
    try:
        state = await kernel.observe()
        held = frozenset(address.interface.ip for address in state.addresses)
        own = node or _own(leases, held)
        if own not in leases:
            words = "no lease names an address of this host; its agent has not leased a subnet yet"
            return [Finding(AGREED, "this host", ok=False, evidence=words)]
        view = NodeView(own, held, state)
        found = [*check_uniqueness(leases, ()), *check_ways(leases, {own: view}), *check_own(view, leases[own])]
        return [*found, *await _probe(netns, view, [lease for name, lease in leases.items() if name != own])]
    finally:
        await kernel.close()
        os.close(netns)


def _own(leases: Mapping[str, Lease], held: frozenset[IPAddress]) -> str:
    mine = (name for name, lease in leases.items() if {lease.attrs.public_ip, lease.attrs.public_ipv6} & held)
    return next(mine, "")


async def _probe(netns: int, view: NodeView, peers: Sequence[Lease]) -> list[Finding]:
    turns = asyncio.Semaphore(MOST_AT_ONCE)

    async def one(peer: Lease, subnet: IPNetwork) -> Finding:
        async with turns:
            return await _mtu(netns, view.state, peer.node, subnet)

    return list(await asyncio.gather(*(one(peer, subnet) for peer in peers for subnet in peer.subnets)))


async def _mtu(netns: int, state: NetState, peer: str, subnet: IPNetwork) -> Finding:
    """A tunnel's far end has the subnet's own address; where packets are routed, only the bridge behind it answers."""
    route = longest_route(state, subnet.network_address)
    link = state.links.get(route.dev) if route else None
    if route is None or link is None or link.mtu is None:
        return Finding(FITTING, peer, ok=False, evidence=f"there is no way to {subnet}")
    target = subnet.network_address if link.owned else subnet.network_address + 1
    try:
        edge, over = await probe_mtu(netns, target, link.mtu)
    except OSError as error:
        edge = over = MtuResult(link.mtu, error.strerror or str(error))
    words = f"{link.name} says {link.mtu}: {edge.size} bytes to {target} {edge.outcome}, {over.size} bytes {over.outcome}"
    return Finding(FITTING, f"{peer} ({subnet})", ok=(edge.outcome, over.outcome) == ("arrived", "too big"), evidence=words)
