"""States put together: units of one namespace, and units over several."""

from collections.abc import Iterable, Mapping

from podwire.model.ids import NetnsName
from podwire.model.kernelstate import Address, FdbEntry, Link, Neighbour, NetState, Route, WireguardPeer

Unit = Mapping[NetnsName, NetState]
"""A piece of desired state that changes as a whole, by namespace."""


def union(states: Iterable[NetState]) -> NetState:
    """States of one namespace put together. Units have no key in common (or agree on it: `lo`)."""
    links: dict[str, Link] = {}
    sysctls: dict[str, str] = {}
    addresses: set[Address] = set()
    routes: set[Route] = set()
    neighbours: set[Neighbour] = set()
    fdb: set[FdbEntry] = set()
    wireguard: set[WireguardPeer] = set()
    for state in states:
        links.update(state.links)
        sysctls.update(state.sysctls)
        addresses |= state.addresses
        routes |= state.routes
        neighbours |= state.neighbours
        fdb |= state.fdb
        wireguard |= state.wireguard
    return NetState(
        links, frozenset(addresses), frozenset(routes), frozenset(neighbours), frozenset(fdb), sysctls, frozenset(wireguard)
    )


def union_units(units: Iterable[Unit]) -> Unit:
    by_ns: dict[NetnsName, list[NetState]] = {}
    for unit in units:
        for ns, state in unit.items():
            by_ns.setdefault(ns, []).append(state)
    return {ns: states[0] if len(states) == 1 else union(states) for ns, states in by_ns.items()}
