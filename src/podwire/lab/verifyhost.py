"""`podwire verify overlay` for this host: its kernel against the leases in its store, and packets to every peer."""

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import current_netns
from podwire.lab.overlayprobe import MOST_AT_ONCE, MtuResult, SourceProbes, probe_mtu
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.kernelstate import Link, NetState
from podwire.plan.leases import Lease
from podwire.trace.overlaycheck import (
    AGREED,
    FITTING,
    KEPT,
    MAPPED,
    Finding,
    NodeView,
    PodAddress,
    check_devices,
    check_mapping,
    check_own,
    check_uniqueness,
    check_ways,
    longest_route,
)


async def verify_host(leases: Mapping[str, Lease], node: str = "", pods: Collection[PodAddress] | None = None) -> list[Finding]:
    """`leases`: all there are, by node. `node`: which is this host's; empty: the one with an address that this host has.
    `pods`: of all nodes, where they are known.

    Raises InvalidInput for whom the kernel does not let capture."""
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
        found = [*check_devices(view, leases), *check_mapping(leases, pods or ()), *check_uniqueness(leases, pods or ())]
        if pods is None:
            words = "not compared: the store does not tell this host of pods, only of subnets"
            found.append(Finding(MAPPED, "pods", ok=None, evidence=words))
        found += [*check_ways(leases, {own: view}), *check_own(view, leases[own])]
        peers = [lease for name, lease in leases.items() if name != own]
        return [*found, *await _probe_sources(netns, view, leases[own], peers), *await _probe_mtus(netns, view, peers)]
    finally:
        await kernel.close()
        os.close(netns)


def _own(leases: Mapping[str, Lease], held: frozenset[IPAddress]) -> str:
    mine = (name for name, lease in leases.items() if {lease.attrs.public_ip, lease.attrs.public_ipv6} & held)
    return next(mine, "")


async def _probe_sources(netns: int, view: NodeView, own: Lease, peers: Sequence[Lease]) -> list[Finding]:
    """From an address of this host's own subnet, as a pod's packet, to every peer's subnet, watched as it leaves."""
    sources = {subnet: source for subnet in own.subnets if (source := _source_in(subnet, view)) is not None}
    if len(sources) < len(own.subnets):
        return [Finding(KEPT, "all", ok=None, evidence="not probed: this host has no address in its own subnet yet")]
    turns = asyncio.Semaphore(MOST_AT_ONCE)
    async with SourceProbes(netns) as probes:

        async def one(source: IPAddress, peer: Lease, subnet: IPNetwork) -> Finding | None:
            target = _target(view.state, subnet)
            if target is None:
                return None  # there is no way, which another finding says
            async with turns:
                result = await probes.probe(source, target)
            seen = ", ".join(sorted(map(str, result.left_as))) or "nothing"
            words = f"from {source} to {target}: left {result.device or 'by no device'} as {seen}"
            words += ", and was answered" if result.answered else ", and was not answered"
            ok = result.left_as == {source} and result.answered
            return Finding(KEPT, f"{view.name} → {peer.node} ({subnet})", ok=ok, evidence=words)

        ways = [
            one(source, peer, subnet)
            for own_subnet, source in sources.items()
            for peer in peers
            for subnet in peer.subnets
            if subnet.version == own_subnet.version
        ]
        return [finding for finding in await asyncio.gather(*ways) if finding is not None]


def _source_in(subnet: IPNetwork, view: NodeView) -> IPAddress | None:
    """The lowest address that the host has in the subnet: a tunnel's, or that of the pods' bridge."""
    inside = [ip for ip in view.addresses if ip.version == subnet.version and ip in subnet]
    return min(inside, key=int, default=None)


async def _probe_mtus(netns: int, view: NodeView, peers: Sequence[Lease]) -> list[Finding]:
    turns = asyncio.Semaphore(MOST_AT_ONCE)

    async def one(peer: Lease, subnet: IPNetwork) -> Finding:
        async with turns:
            return await _mtu(netns, view.state, peer.node, subnet)

    return list(await asyncio.gather(*(one(peer, subnet) for peer in peers for subnet in peer.subnets)))


async def _mtu(netns: int, state: NetState, peer: str, subnet: IPNetwork) -> Finding:
    link, target = _link_towards(state, subnet), _target(state, subnet)
    if link is None or link.mtu is None or target is None:
        return Finding(FITTING, peer, ok=False, evidence=f"there is no way to {subnet}")
    try:
        edge, over = await probe_mtu(netns, target, link.mtu)
    except OSError as error:
        edge = over = MtuResult(link.mtu, error.strerror or str(error))
    words = f"{link.name} says {link.mtu}: {edge.size} bytes to {target} {edge.outcome}, {over.size} bytes {over.outcome}"
    return Finding(FITTING, f"{peer} ({subnet})", ok=(edge.outcome, over.outcome) == ("arrived", "too big"), evidence=words)


def _link_towards(state: NetState, subnet: IPNetwork) -> Link | None:
    route = longest_route(state, subnet.network_address)
    return state.links.get(route.dev) if route else None


def _target(state: NetState, subnet: IPNetwork) -> IPAddress | None:
    """A tunnel's far end has the subnet's own address; where packets are routed, only the bridge behind it answers."""
    link = _link_towards(state, subnet)
    if link is None:
        return None
    return subnet.network_address if link.owned else subnet.network_address + 1
