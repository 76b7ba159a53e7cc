"""Service addresses and node ports: who gets which, without duplicates.

An allocation is a key in the store, one for each address (its IPAddress object) and port, written in the same commit as the
Service that holds it and expected absent: so no two can have it, whatever runs in parallel. The commit also checks that the
ServiceCIDR which an address is from is still as it was: none is given out of one that is about to go. The allocator keeps the
same in memory, to choose by; what it hands out is reserved at once, until `settle` or `abandon`.

Bands and texts: kube-apiserver. Dynamic choice takes the upper bands first, so that fixed wishes find the lower ones free.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

from podwire.apiserver.addressranges import Choose, FamilyAddresses, Source, free_number, static_band
from podwire.apiserver.ipfamilies import family_of, settle_families
from podwire.apiserver.storage import prefix_of
from podwire.apiserver.validation import FieldError, Path, invalid
from podwire.model.addr import IPNetwork
from podwire.model.errors import PodwireError
from podwire.model.meta import Json
from podwire.model.resources import IPADDRESSES

IP_PREFIX = prefix_of(IPADDRESSES)
PORT_PREFIX = "/registry/ranges/servicenodeports/"

_SPEC = Path() / "spec"


class AllocationFailed(PodwireError):
    """The Service's wishes cannot be met: a 422 with these causes."""

    def __init__(self, errors: list[FieldError]) -> None:
        self.errors = errors
        super().__init__("; ".join(map(str, errors)))


class RangeFull(PodwireError):
    """Nothing is left to hand out: a 500, as in Kubernetes."""


@dataclass(frozen=True)
class ServiceRanges:
    """What the server is started with. `cluster`: one network for each family, the primary family's first: it says which
    families Services have; where addresses come from is said by the ServiceCIDRs. `node_ports`: as in range(30000, 32768)."""

    cluster: tuple[IPv4Network | IPv6Network, ...]
    node_ports: range

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(f"IPv{network.version}" for network in self.cluster)


class Allocation(NamedTuple):
    """What to commit together: the Service, keys that must be absent and are put, keys that are deleted, and the ServiceCIDRs
    that must be as they were."""

    service: Json
    acquire: tuple[str, ...]
    release: tuple[str, ...]
    sources: tuple[Source, ...] = ()


def ip_key(address: str) -> str:
    return f"{IP_PREFIX}{ip_address(address)}"


def port_key(port: int) -> str:
    return f"{PORT_PREFIX}{port}"


def held(service: Json | None) -> set[str]:
    """The keys of all addresses and node ports that the Service holds."""
    spec = (service or {}).get("spec") or {}
    if spec.get("type") == "ExternalName":
        return set()
    addresses = spec.get("clusterIPs") or [spec.get("clusterIP")]
    keys = {ip_key(address) for address in addresses if address and address != "None"}
    if spec.get("type") in ("NodePort", "LoadBalancer"):
        ports = [port.get("nodePort") for port in spec.get("ports") or []]
        if spec["type"] == "LoadBalancer":
            ports.append(spec.get("healthCheckNodePort"))
        keys |= {port_key(port) for port in ports if port}
    return keys


class _Ports:
    """The node ports of the range, of which some are taken."""

    def __init__(self, ports: range) -> None:
        self.ports = ports
        self._split = ports.start + static_band(len(ports), 32, 16, 128)
        self.taken: set[int] = set()

    def pick(self, choose: Choose) -> int | None:
        """A free one: of the upper band, else of the lower; None when all are taken."""
        if len(self.taken) >= len(self.ports):
            return None
        upper = free_number(self.taken, self._split, self.ports.stop, choose)
        return free_number(self.taken, self.ports.start, self._split, choose) if upper is None else upper

    def mark(self, port: int, *, taken: bool) -> None:
        if port in self.ports:
            (self.taken.add if taken else self.taken.discard)(port)


class _Reserved:
    """What one plan has taken so far."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.sources: dict[str, Source] = {}


class ServiceAllocator:
    """Decides; commits nothing. One for each API server process."""

    def __init__(self, ranges: ServiceRanges, choose: Choose) -> None:
        self._ranges, self._choose = ranges, choose
        self._addresses = {family: FamilyAddresses() for family in ("IPv4", "IPv6")}
        self._ports = _Ports(ranges.node_ports)

    def set_range(self, source: Source, networks: Iterable[IPNetwork]) -> None:
        """A ServiceCIDR gives addresses out of these networks from now on, at most one a family; none: it does not."""
        given = {f"IPv{network.version}": network for network in networks}
        for family, addresses in self._addresses.items():
            addresses.set_range(source, given.get(family))

    def drop_ranges(self) -> None:
        """There is no ServiceCIDR."""
        for addresses in self._addresses.values():
            addresses.drop_ranges()

    def load(self, keys: Iterable[str]) -> None:
        """Marks what the store's keys hold as taken."""
        for key in keys:
            self._mark(key, taken=True)

    def plan(self, new: Json, old: Json | None = None) -> Allocation:
        """What `new` gets, in place of `old`; `new` is not changed.

        Raises AllocationFailed or RangeFull, and then has reserved nothing.
        """
        service = {**new, "spec": dict(new.get("spec") or {})}
        spec, before = service["spec"], held(old)
        errors = settle_families(spec, (old or {}).get("spec"), self._ranges.families)
        if errors:
            raise AllocationFailed(errors)
        reserved = _Reserved()
        try:
            self._assign_addresses(spec, before, reserved)
            self._assign_ports(spec, before, reserved)
        except (AllocationFailed, RangeFull):
            self._forget(reserved.keys)
            raise
        released = tuple(sorted(before - held(service)))
        return Allocation(service, tuple(sorted(reserved.keys)), released, tuple(reserved.sources.values()))

    def release(self, old: Json) -> Allocation:
        """The keys to delete with a Service."""
        return Allocation(old, (), tuple(sorted(held(old))))

    def settle(self, allocation: Allocation) -> None:
        """The commit is done: what was released is free again."""
        self._forget(allocation.release)

    def abandon(self, allocation: Allocation) -> None:
        """The commit failed or was a dry run: nothing was acquired."""
        self._forget(allocation.acquire)

    def start_over(self, prefix: str, keys: Iterable[str]) -> None:
        """Of the addresses (IP_PREFIX) or the ports (PORT_PREFIX), exactly what the store's keys hold is taken."""
        if prefix == IP_PREFIX:
            for addresses in self._addresses.values():
                addresses.clear()
        else:
            self._ports.taken.clear()
        self.load(keys)

    def follow(self, key: str, *, taken: bool) -> None:
        """The store says that `key` is there, or is not: another server may have taken it, or given it back."""
        self._mark(key, taken=taken)

    # --- addresses

    def _assign_addresses(self, spec: Json, before: set[str], reserved: _Reserved) -> None:
        if spec.get("type") == "ExternalName" or spec.get("clusterIP") == "None":
            return
        wished = list(spec.get("clusterIPs") or [])
        for address in wished:
            key = ip_key(address)
            if key not in before:
                self._take_address(address, wished, reserved)
        for family in spec.get("ipFamilies", [])[len(wished) :]:
            found = self._addresses[family].pick(self._choose)
            if found is None:
                raise RangeFull("failed to allocate a serviceIP: range is full")
            number, source = found
            address = str(IPv4Address(number) if family == "IPv4" else IPv6Address(number))
            wished.append(address)
            self._reserve_address(IP_PREFIX + address, number, source, reserved)
        spec["clusterIPs"], spec["clusterIP"] = wished, wished[0]

    def _take_address(self, address: str, wished: list[str], reserved: _Reserved) -> None:
        addresses = self._addresses[family_of(address)]
        number = int(ip_address(address))
        source = addresses.source_of(number)
        if source is not None and number not in addresses.taken:
            self._reserve_address(ip_key(address), number, source, reserved)
            return
        problem = "provided IP is already allocated"
        if source is None:
            valid = ", ".join(map(str, addresses.networks))
            problem = f"the provided IP ({address}) is not in the valid range. The range of valid IPs is {valid}"
        text = f"failed to allocate IP {address}: {problem}"
        raise AllocationFailed([invalid(_SPEC / "clusterIPs", wished, text)])

    # --- node ports

    def _assign_ports(self, spec: Json, before: set[str], reserved: _Reserved) -> None:
        kind = spec.get("type")
        if kind not in ("NodePort", "LoadBalancer"):
            return
        wants_all = kind == "NodePort" or spec.get("allocateLoadBalancerNodePorts", True)
        spec["ports"] = ports = [dict(port) for port in spec.get("ports") or []]
        for i, port in enumerate(ports):
            if port.get("nodePort"):
                at = _SPEC / "ports" @ i / "nodePort"
                self._take_port(port["nodePort"], at, before, reserved)
        for port in ports:
            if wants_all and not port.get("nodePort"):
                port["nodePort"] = _shared(port, ports) or self._pick_port("nodePort", reserved)
        if kind == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            if spec.get("healthCheckNodePort"):
                self._take_port(spec["healthCheckNodePort"], _SPEC / "healthCheckNodePort", before, reserved)
            else:
                spec["healthCheckNodePort"] = self._pick_port("HealthCheck NodePort", reserved)

    def _take_port(self, port: int, at: Path, before: set[str], reserved: _Reserved) -> None:
        key = port_key(port)
        if key in before or key in reserved.keys:
            return
        ports = self._ports.ports
        if port not in ports:
            text = f"provided port is not in the valid range. The range of valid ports is {ports[0]}-{ports[-1]}"
            raise AllocationFailed([invalid(at, port, text)])
        if port in self._ports.taken:
            raise AllocationFailed([invalid(at, port, "provided port is already allocated")])
        self._reserve_port(port, reserved)

    def _pick_port(self, what: str, reserved: _Reserved) -> int:
        port = self._ports.pick(self._choose)
        if port is None:
            raise RangeFull(f"failed to allocate a {what}: range is full")
        self._reserve_port(port, reserved)
        return port

    # --- bookkeeping

    def _reserve_address(self, key: str, number: int, source: Source, reserved: _Reserved) -> None:
        self._addresses[family_of(key)].mark(number, taken=True)
        reserved.keys.add(key)
        reserved.sources[source.name] = source

    def _reserve_port(self, port: int, reserved: _Reserved) -> None:
        self._ports.mark(port, taken=True)
        reserved.keys.add(port_key(port))

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._mark(key, taken=False)

    def _mark(self, key: str, *, taken: bool) -> None:
        if key.startswith(IP_PREFIX):
            address = key.removeprefix(IP_PREFIX)
            with contextlib.suppress(ValueError):  # the API takes no other names; whoever else wrote it has taken nothing
                self._addresses[family_of(address)].mark(int(ip_address(address)), taken=taken)
        elif key.startswith(PORT_PREFIX):
            self._ports.mark(int(key.removeprefix(PORT_PREFIX)), taken=taken)
        # kube-apiserver's own records lie beside ours


def _shared(port: Json, ports: list[Json]) -> int:
    """The node port of another port of the Service with the same number and another protocol (as DNS has); 0 if none."""
    for other in ports:
        if other is not port and other.get("nodePort") and other.get("port") == port.get("port"):
            users = [p for p in ports if p.get("nodePort") == other["nodePort"]]
            if all(p.get("protocol", "TCP") != port.get("protocol", "TCP") for p in users):
                return int(other["nodePort"])
    return 0
