"""Which interface carries the overlay: the one that the user names, or the one with the default route.

As flannel chooses: `--iface` (names or addresses) before `--iface-regex`, each in order and the first that fits; then
`--iface-can-reach`; then the default route.
"""

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from podwire.model.addr import Family, IPAddress, IPInterface, family_of
from podwire.model.errors import InvalidInput
from podwire.model.kernelstate import Link, NetState
from podwire.plan.backends.contract import Underlay


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user said. names: interfaces or addresses of them. patterns: regular expressions for either.
    public: what peers are told instead of the interface's addresses, at most one of each family."""

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    public: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the node's routes say, for a node whose user named no interface.

    devices: with the default route, by family; or that through which --iface-can-reach goes. sources: the addresses that the
    kernel would take there."""

    devices: Mapping[Family, str]
    sources: tuple[IPAddress, ...] = ()


def choose_underlay(
    state: NetState, wish: Wish, routing: Routing, families: Collection[Family], *, all_needed: bool = True
) -> Underlay:
    """The underlay with an address of each of `families`, or (`all_needed` false) of those that there are.

    Raises InvalidInput, listing what there is, where nothing fits."""
    if wish.names or wish.patterns:
        found = _named(state, wish, families, all_needed)
        asked = ", ".join([*(f"--iface {n}" for n in wish.names), *(f"--iface-regex {p}" for p in wish.patterns)])
    else:
        found = _routed(state, routing, families, all_needed)
        asked = "the default route"
    if found is None:
        wanted = " and ".join(family.value for family in families)
        raise InvalidInput(
            f"no interface with an {wanted} address fits {asked}; there are {_list(state)}: name one with --iface"
        )
    link, interfaces = found
    public = {family_of(i): i.ip for i in interfaces} | {family_of(address): address for address in wish.public}
    told = tuple(public[family] for family in Family if family in public)
    return Underlay(device=link.name, mtu=link.mtu or 1500, interfaces=interfaces, public=told)


def follow_underlay(current: Underlay, state: NetState) -> Underlay | None:
    """The underlay as it is now; None where the interface does not have its addresses any more and one has to be chosen anew.

    Others that it got meanwhile are no reason to move: peers know the old one."""
    link = state.links.get(current.device)
    held = {address.interface for address in state.addresses if address.dev == current.device}
    if link is None or not held.issuperset(current.interfaces):
        return None
    return replace(current, mtu=link.mtu or 1500)


Found = tuple[Link, tuple[IPInterface, ...]]


def _named(state: NetState, wish: Wish, families: Collection[Family], all_needed: bool) -> Found | None:
    for name in wish.names:
        preferred = _as_address(name)
        for link in _links(state):
            held = [a.interface for a in state.addresses if a.dev == link.name]
            if link.name == name or any(i.ip == preferred for i in held):
                interfaces = _pick(held, families, [preferred] if preferred else [])
                if _enough(interfaces, families, all_needed):
                    return link, interfaces
    for text in wish.patterns:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise InvalidInput(f"--iface-regex {text!r} is no regular expression: {error}") from error
        for link in _links(state):
            held = [a.interface for a in state.addresses if a.dev == link.name]
            matching = [i.ip for i in held if pattern.search(str(i.ip))]
            if matching or pattern.search(link.name):
                interfaces = _pick(held, families, matching)
                if _enough(interfaces, families, all_needed):
                    return link, interfaces
    return None


def _routed(state: NetState, routing: Routing, families: Collection[Family], all_needed: bool) -> Found | None:
    for family in families:
        link = state.links.get(routing.devices.get(family, ""))
        if link is None:
            continue
        held = [a.interface for a in state.addresses if a.dev == link.name]
        interfaces = _pick(held, families, routing.sources)
        if _enough(interfaces, families, all_needed):
            return link, interfaces
    return None


def _links(state: NetState) -> list[Link]:
    """Those that packets could leave by: up, not `lo`, not ours."""
    return sorted((k for k in state.links.values() if k.up and k.name != "lo" and not k.owned), key=lambda link: link.name)


def _pick(held: Iterable[IPInterface], families: Collection[Family], preferred: Iterable[IPAddress]) -> tuple[IPInterface, ...]:
    """One address of each family: a preferred one, else one with a network before a lone one (they tend to be virtual)."""
    wanted = set(preferred)

    def rank(interface: IPInterface) -> tuple[bool, bool, int]:
        alone = interface.network.prefixlen == interface.max_prefixlen
        return interface.ip not in wanted, alone, int(interface.ip)

    usable = [i for i in held if not i.ip.is_link_local and not i.ip.is_loopback]
    best = (
        min((i for i in usable if family_of(i) is family), key=rank, default=None) for family in Family if family in families
    )
    return tuple(interface for interface in best if interface is not None)


def _enough(interfaces: tuple[IPInterface, ...], families: Collection[Family], all_needed: bool) -> bool:
    return len(interfaces) == len(families) if all_needed else bool(interfaces)


def _as_address(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _list(state: NetState) -> str:
    words = []
    for link in _links(state):
        held = sorted(str(a.interface) for a in state.addresses if a.dev == link.name and not a.interface.ip.is_link_local)
        words.append(f"{link.name} ({', '.join(held) or 'no address'})")
    return ", ".join(words) or "none that are up"
