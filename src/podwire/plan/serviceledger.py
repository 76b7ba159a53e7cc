"""Who is served under which address and port: the tables of all Services and host ports, merged. Every back end's half that
does not depend on how the kernel is programmed.

A `FrontendSink` is told of each frontend that won its address, family by family, as it comes, changes and goes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import Frontend, FrontendKind, NodeFacts, ServiceTable
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_table import host_port_table, service_table

_RANK = {kind: rank for rank, kind in enumerate(FrontendKind)}


class Counted(Protocol):
    """Keys that several owners may want: each is there while anyone does."""

    def want(self, key: bytes) -> None: ...

    def release(self, key: bytes) -> None: ...


class FrontendSink(Protocol):
    """One family's rules. `hairpin`: pairs of equal addresses, those of this node's backends. `cluster_ips`: see
    `ServiceTable`."""

    @property
    def hairpin(self) -> Counted: ...

    @property
    def cluster_ips(self) -> Counted: ...

    def frontend(self, key: bytes) -> Frontend:
        """What is served under `key`."""
        ...

    def program(self, key: bytes, frontend: Frontend | None, owner: str = "") -> None:
        """Serve `frontend` under `key`; None: nothing any more."""
        ...


S = TypeVar("S", bound=FrontendSink)


class ServiceLedger(Generic[S]):
    """Holds what every Service and pod asks of this node, and tells the families' sinks. `make` makes an empty sink."""

    def __init__(self, facts: NodeFacts, make: Callable[[Family, NodeFacts], S]) -> None:
        self._facts, self._make = facts, make
        self._inputs: dict[ObjectKey, tuple[Service, tuple[EndpointSlice, ...]]] = {}
        self._pods: dict[str, Pod] = {}
        self._reset()

    def _reset(self) -> None:
        self._maps: dict[int, S] = {length: self._make(f, self._facts) for length, f in ((4, Family.IPV4), (16, Family.IPV6))}
        self._tables: dict[str, ServiceTable] = {}
        self._holders: dict[bytes, str] = {}
        """Whose frontend is programmed under a key."""
        self._rivals: dict[bytes, dict[str, Frontend]] = {}
        """Keys that several owners want, with all of their frontends."""

    def set_facts(self, facts: NodeFacts) -> None:
        """The node changed (address, CIDRs, zone): everything is planned again. Compare with the kernel after it."""
        if facts == self._facts:
            return
        self._facts = facts
        self._reset()
        for key, (service, slices) in self._inputs.items():
            self._set_table(_service_owner(key), service_table(service, slices, facts))
        for uid, pod in self._pods.items():
            self._set_table(_pod_owner(uid), host_port_table(pod, facts))

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        """A Service with all of its slices as they are now; None: it is gone."""
        if service is None:
            self._inputs.pop(key, None)
        else:
            self._inputs[key] = (service, tuple(slices))
        self._set_table(_service_owner(key), service_table(service, slices, self._facts))

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        """A pod of this node that has addresses (status.podIPs) and may have host ports; None: it is gone."""
        if pod is None:
            self._pods.pop(uid, None)
        else:
            self._pods[uid] = pod
        self._set_table(_pod_owner(uid), host_port_table(pod, self._facts))

    def table(self, key: ObjectKey) -> ServiceTable:
        """What is planned for a Service; empty for one that is not known."""
        return self._tables.get(_service_owner(key), ServiceTable())

    def frontends(self, key: ObjectKey) -> Iterator[Frontend]:
        """What is programmed at a Service's addresses and ports: its own frontends, and those that had precedence."""
        for frontend in self.table(key).frontends:
            yield self._maps[len(frontend.address)].frontend(frontend_key(frontend))

    def served_at(self, key: bytes) -> Frontend | None:
        """What is programmed under a frontend's key, whoever has precedence there."""
        return self._maps_of(key).frontend(key) if key in self._holders else None

    def owner_at(self, key: bytes) -> str:
        """Whose frontend is programmed under a key, in words; empty for nobody's."""
        return self._holders.get(key, "")

    # --- owners and their frontends -------------------------------------------------------------------------------

    def _set_table(self, owner: str, new: ServiceTable) -> None:
        old = self._tables.get(owner, _EMPTY)
        if new == old:
            return
        if new != _EMPTY:
            self._tables[owner] = new
        else:
            self._tables.pop(owner, None)
        self._count(old, new)
        if not old.frontends:
            for frontend in new.frontends:
                self._claim(frontend_key(frontend), owner, frontend)
            return
        before = {frontend_key(f): f for f in old.frontends}
        after = {frontend_key(f): f for f in new.frontends}
        for key in before:
            if key not in after:
                self._withdraw(key, owner)
        for key, frontend in after.items():
            if before.get(key) != frontend:
                self._claim(key, owner, frontend)

    def _claim(self, key: bytes, owner: str, frontend: Frontend) -> None:
        holder = self._holders.get(key)
        if holder is None or (holder == owner and key not in self._rivals):
            self._win(key, owner, frontend)
            return
        rivals = self._rivals.get(key)
        if rivals is None:
            rivals = self._rivals[key] = {holder: self._maps_of(key).frontend(key)}
        rivals[owner] = frontend
        self._settle(key, rivals)

    def _withdraw(self, key: bytes, owner: str) -> None:
        rivals = self._rivals.get(key)
        if rivals is None:
            del self._holders[key]
            self._maps_of(key).program(key, None)
        else:
            del rivals[owner]
            self._settle(key, rivals)

    def _settle(self, key: bytes, rivals: dict[str, Frontend]) -> None:
        """The smallest gets it, whatever the order they came in: a ClusterIP before a node port, that before balancer
        addresses, external IPs and host ports; then by name."""
        winner = min(rivals, key=lambda owner: (_RANK[rivals[owner].kind], owner))
        self._win(key, winner, rivals[winner])
        if len(rivals) == 1:
            del self._rivals[key]

    def _win(self, key: bytes, owner: str, frontend: Frontend) -> None:
        self._holders[key] = owner
        self._maps[len(frontend.address)].program(key, frontend, owner)

    def _maps_of(self, key: bytes) -> S:
        return self._maps[len(key) - _PROTOCOL_AND_PORT]

    def _count(self, old: ServiceTable, new: ServiceTable) -> None:
        """Elements that several owners may want."""
        if new.local_addresses != old.local_addresses:
            for address in new.local_addresses - old.local_addresses:
                self._maps[len(address)].hairpin.want(address + address)
            for address in old.local_addresses - new.local_addresses:
                self._maps[len(address)].hairpin.release(address + address)
        if new.cluster_ips != old.cluster_ips:
            held, wanted = set(old.cluster_ips), set(new.cluster_ips)
            for address in wanted - held:
                self._maps[len(address)].cluster_ips.want(address)
            for address in held - wanted:
                self._maps[len(address)].cluster_ips.release(address)


_EMPTY = ServiceTable()
_PROTOCOL_AND_PORT = 8
"""Bytes of a frontend's key behind the address."""


def _service_owner(key: ObjectKey) -> str:
    return str(key)


def _pod_owner(uid: str) -> str:
    return f"host ports of pod {uid}"
