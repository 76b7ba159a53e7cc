"""Tracked UDP connections that would go on to an endpoint which is gone.

The kernel decides about a connection at its first packet, and UDP has no end: a client that keeps sending from one port keeps
its connection, and its endpoint, for ever. So after a Service's endpoints changed, those connections are forgotten
that lead to none of them, also where the Service has no endpoint left or is gone (kubernetes issue 139628). An endpoint is an
address with a port: one whose port changed is another. TCP is left alone: its end is seen.
"""

from collections.abc import Callable, Iterable, Mapping

from podwire.model.addr import IPNetwork
from podwire.model.flow import Flow
from podwire.model.objects import Endpoint, EndpointSlice
from podwire.model.servicetable import Backend, Frontend, ServiceTable, backend
from podwire.plan.services_maps import place_key
from podwire.plan.services_table import PROTOCOLS, pack_address

UDP = 17

Place = tuple[bytes, int]
"""A packed address and a UDP port that clients send to."""
_Serving = Mapping[str, frozenset[Backend]]
"""By the name of the Service's port."""


class StaleFlows:
    """Gathers the UDP frontends whose endpoints changed; `matches` picks the connections to forget."""

    def __init__(self) -> None:
        self._allowed: dict[Place, frozenset[Backend]] = {}
        self._ranges: tuple[IPNetwork, ...] = ()
        self._others: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        return bool(self._allowed or self._ranges)

    def note_all(
        self, service_cidrs: Iterable[IPNetwork], served: Iterable[Place] = (), others: frozenset[bytes] = frozenset()
    ) -> None:
        """Every Service there is has been noted. Connections to other addresses of these ranges, and to what else the kernel
        has `served`, were made to Services that went while nobody looked; but `others` are addresses that another proxy has."""
        self._ranges, self._others = tuple(service_cidrs), others
        for place in served:
            self._allowed.setdefault(place, frozenset())

    def note(self, old: ServiceTable, new: ServiceTable, slices: Iterable[EndpointSlice] = ()) -> None:
        """A Service's table changed. Endpoints in `slices` that still serve keep their connections, chosen or not."""
        before, after = _udp(old), _udp(new)
        if not before and not after:
            return
        changed = [
            place for place in before.keys() | after.keys() if _backends(before.get(place)) != _backends(after.get(place))
        ]
        if not changed:
            return
        serving = serving_endpoints(slices)
        for place in changed:
            frontend = after.get(place)
            kept = serving.get(frontend.port_name, frozenset()) if frontend else frozenset()
            self._allowed[place] = (_backends(frontend) or frozenset()) | kept

    def settle(self, served_at: Callable[[bytes], Frontend | None]) -> None:
        """All changes are planned, and this is what is served under a frontend's key now. Where two want one address, the one
        that changed need not be the one that has it."""
        for (address, port), allowed in self._allowed.items():
            served = _backends(served_at(place_key(address, UDP, port)))
            if served is not None:
                self._allowed[address, port] = allowed | served

    def take(self) -> "StaleFlows":
        """What was gathered so far, as a value of its own; this one is empty then."""
        taken = StaleFlows()
        taken._allowed, self._allowed = self._allowed, {}
        taken._ranges, self._ranges = self._ranges, ()
        taken._others = self._others
        return taken

    def restore(self, taken: "StaleFlows") -> None:
        """Put back what could not be done; what has been noted since is newer."""
        self._allowed = taken._allowed | self._allowed
        self._ranges, self._others = self._ranges or taken._ranges, self._others or taken._others

    def matches(self, flow: Flow) -> bool:
        """Whether the connection was made to one of the frontends and is answered by none of its endpoints."""
        if flow.original.protocol != UDP:
            return False
        allowed = self._allowed.get((flow.original.dst.packed, flow.original.dport))
        if allowed is None:
            of_a_range = any(flow.original.dst in network for network in self._ranges)
            return of_a_range and flow.original.dst.packed not in self._others
        return backend(flow.reply.src.packed, flow.reply.sport) not in allowed


def serving_endpoints(slices: Iterable[EndpointSlice]) -> _Serving:
    """The UDP endpoints that still answer (serving; nil means ready's value, whose nil means yes), by name of port."""
    found: dict[str, set[Backend]] = {}
    for part in slices:
        packed = [a for e in part.endpoints if _serves(e) for text in e.addresses if (a := pack_address(text))]
        for port in part.ports:
            if port.port and PROTOCOLS.get(port.protocol) == UDP:
                found.setdefault(port.name, set()).update(backend(address, port.port) for address in packed)
    return {name: frozenset(endpoints) for name, endpoints in found.items()}


def _serves(endpoint: Endpoint) -> bool:
    conditions = endpoint.conditions
    ready = conditions.ready is not False
    return ready if conditions.serving is None else conditions.serving


def _udp(table: ServiceTable) -> Mapping[Place, Frontend]:
    return {(f.address, f.port): f for f in table.frontends if f.protocol == UDP}


def _backends(frontend: Frontend | None) -> frozenset[Backend] | None:
    """None for no frontend: the first endpoints of a Service are news, and so is that it is gone."""
    return None if frontend is None else frozenset(frontend.backends)
