"""Tracked UDP connections that would go on to an endpoint which is gone.

The kernel decides about a connection at its first packet, and UDP has no end: a client that keeps sending from one port keeps
its connection, and its endpoint, for ever. So after a Service's endpoints changed, those connections are forgotten
that lead to none of them, also where the Service has no endpoint left or is gone (kubernetes issue 139628). TCP is left
alone: its end is seen.
"""

import ipaddress
from collections.abc import Iterable, Mapping

from podwire.model.addr import IPNetwork
from podwire.model.flow import Flow
from podwire.model.objects import Endpoint, EndpointSlice
from podwire.model.servicetable import Frontend, ServiceTable, backend_address

UDP = 17


class StaleFlows:
    """Gathers the UDP frontends whose endpoints changed; `matches` picks the connections to forget."""

    def __init__(self) -> None:
        self._allowed: dict[tuple[bytes, int], frozenset[bytes]] = {}
        self._ranges: tuple[IPNetwork, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._allowed or self._ranges)

    def note_all(self, service_cidrs: Iterable[IPNetwork]) -> None:
        """Every Service there is has been noted: connections to other addresses of these ranges were made to Services that
        went while nobody looked."""
        self._ranges = tuple(service_cidrs)

    def note(self, old: ServiceTable, new: ServiceTable, slices: Iterable[EndpointSlice] = ()) -> None:
        """A Service's table changed. Endpoints in `slices` that still serve keep their connections, chosen or not."""
        before, after = _udp(old), _udp(new)
        if before == after:
            return
        serving = serving_addresses(slices)
        for key in before.keys() | after.keys():
            if before.get(key) != after.get(key):
                self._allowed[key] = after[key] | serving if key in after else frozenset()

    def take(self) -> "StaleFlows":
        """What was gathered so far, as a value of its own; this one is empty then."""
        taken = StaleFlows()
        taken._allowed, self._allowed = self._allowed, {}
        taken._ranges, self._ranges = self._ranges, ()
        return taken

    def restore(self, taken: "StaleFlows") -> None:
        """Put back what could not be done; what has been noted since is newer."""
        self._allowed = taken._allowed | self._allowed
        self._ranges = self._ranges or taken._ranges

    def matches(self, flow: Flow) -> bool:
        """Whether the connection was made to one of the frontends and is answered by none of its endpoints."""
        if flow.original.protocol != UDP:
            return False
        allowed = self._allowed.get((flow.original.dst.packed, flow.original.dport))
        if allowed is None:
            return any(flow.original.dst in network for network in self._ranges)
        return flow.reply.src.packed not in allowed


def serving_addresses(slices: Iterable[EndpointSlice]) -> frozenset[bytes]:
    """Packed addresses of the endpoints that still answer (serving; nil means ready's value, whose nil means yes)."""
    found = {address for part in slices for endpoint in part.endpoints if _serves(endpoint) for address in endpoint.addresses}
    return frozenset(packed for text in found if (packed := _pack(text)))


def _serves(endpoint: Endpoint) -> bool:
    conditions = endpoint.conditions
    ready = conditions.ready is not False
    return ready if conditions.serving is None else conditions.serving


def _pack(text: str) -> bytes | None:
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        return None  # an FQDN slice, or nonsense: no connection can lead there


def _udp(table: ServiceTable) -> Mapping[tuple[bytes, int], frozenset[bytes]]:
    return {(f.address, f.port): _addresses(f) for f in table.frontends if f.protocol == UDP}


def _addresses(frontend: Frontend) -> frozenset[bytes]:
    backends = frontend.inside.backends + (frontend.outside.backends if frontend.outside else ())
    return frozenset(map(backend_address, backends))
