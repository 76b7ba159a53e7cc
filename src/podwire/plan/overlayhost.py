"""The part of a host's state that an overlay agent wants: the back end's devices, and the switches without which packets die.

Only the devices concerned are touched, never `all`: the host is somebody's.
"""

from collections.abc import Mapping

from podwire.model.addr import Family, IPNetwork, family_of
from podwire.model.kernelstate import Link, NetState, Route
from podwire.plan.backends.contract import Backend, Underlay
from podwire.plan.diff import same_kind
from podwire.plan.states import union

LAST_RESORT = 4278198272
"""A metric behind all others (the one that Linux' documentation of VRFs takes for this). A blackhole with metric 0 would come
before the pods' own bridge."""


def plan_overlay_host(
    backend: Backend,
    underlay: Underlay,
    subnets: tuple[IPNetwork, ...],
    switches: Mapping[str, str],
    *,
    blackhole: bool = False,
) -> NetState:
    """`switches`: current values of those that `switches_to_read` names.

    `blackhole`: what goes to an own subnet while no device has it is dropped here. Otherwise it takes the default route, or
    the one of the whole network, and may go in circles.

    * forwarding, of the families that there are; a host that follows router advertisements goes on to (accept_ra 2), since
      with forwarding on the kernel would stop, and the host lose its default route.
    * rp_filter 2 where an answer may come another way than the request went: on the tunnels and on the underlay."""
    base = backend.plan_base(subnets)
    families = {family_of(subnet) for subnet in subnets}
    wanted: dict[str, str] = {}
    if Family.IPV4 in families:
        wanted["net/ipv4/ip_forward"] = "1"
        wanted |= {f"net/ipv4/conf/{device}/rp_filter": "2" for device in (underlay.device, *base.links)}
    if Family.IPV6 in families:
        follows = _accept_ra(underlay.device)
        if switches.get(follows) in ("1", "2"):
            wanted[follows] = "2"
        wanted["net/ipv6/conf/all/forwarding"] = "1"
        wanted |= {_accept_ra(name): "0" for name in base.links}
    holes = (Route(subnet, metric=LAST_RESORT, blackhole=True) for subnet in subnets) if blackhole else ()
    return union([base, NetState(routes=frozenset(holes), sysctls=wanted)])


def switches_to_read(underlay: Underlay) -> tuple[str, ...]:
    return (_accept_ra(underlay.device),)


def in_the_way(wanted: NetState, observed: NetState) -> list[Link]:
    """Devices that have our names but are not ours and cannot be made so: an earlier flannel's with other settings."""
    pairs = ((link, observed.links.get(name)) for name, link in wanted.links.items())
    return [found for link, found in pairs if found is not None and not found.owned and not same_kind(link, found)]


def _accept_ra(device: str) -> str:
    return f"net/ipv6/conf/{device}/accept_ra"
