"""Service addresses and node ports: who gets which, without duplicates.

An allocation is a key in the store, one for each address and port, written in the same commit as the Service that holds it
and expected absent: so no two can have it, whatever runs in parallel. The allocator keeps the same in memory, to choose by;
what it hands out is reserved at once, until `settle` or `abandon`.

Bands and texts: kube-apiserver. Dynamic choice takes the upper band first, so that fixed wishes find the lower one free.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import NamedTuple

from podwire.apiserver.ipfamilies import family_of, settle_families
from podwire.apiserver.validation import FieldError, Path, invalid
from podwire.model.errors import PodwireError
from podwire.model.meta import Json

PREFIX = "/registry/ranges/"
IP_PREFIX = PREFIX + "serviceips/"
PORT_PREFIX = PREFIX + "servicenodeports/"

_SPEC = Path() / "spec"

Choose = Callable[[int], int]
"""n → a number in 0..n-1; random in production."""


class AllocationFailed(PodwireError):
    """The Service's wishes cannot be met: a 422 with these causes."""

    def __init__(self, errors: list[FieldError]) -> None:
        self.errors = errors
        super().__init__("; ".join(map(str, errors)))


class RangeFull(PodwireError):
    """Nothing is left to hand out: a 500, as in Kubernetes."""


@dataclass(frozen=True)
class ServiceRanges:
    """`cluster`: one network for each family, the primary family's first. `node_ports`: as in range(30000, 32768)."""

    cluster: tuple[IPv4Network | IPv6Network, ...]
    node_ports: range

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(f"IPv{network.version}" for network in self.cluster)


class Allocation(NamedTuple):
    """What to commit together: the Service, keys that must be absent and are put, keys that are deleted."""

    service: Json
    acquire: tuple[str, ...]
    release: tuple[str, ...]


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


def static_band(size: int, divisor: int, least: int, most: int) -> int:
    """How many of `size` from the start are left to fixed wishes: size/divisor within least..most; none if too few."""
    return 0 if size < least else min(max(least, size // divisor), most)


class _Pool:
    """Numbers 0..size-1, of which some are taken."""

    def __init__(self, size: int, band: int) -> None:
        self._size, self._band = size, band
        self.taken: set[int] = set()

    def pick(self, choose: Choose) -> int | None:
        """A free number: the upper band from a random start, then the lower; None when all are taken."""
        if len(self.taken) >= self._size:
            return None
        for low, high in ((self._band, self._size), (0, self._band)):
            span = high - low
            start = choose(span) if span else 0
            for step in range(span):
                number = low + (start + step) % span
                if number not in self.taken:
                    return number
        return None


class _AddressPool(_Pool):
    def __init__(self, network: IPv4Network | IPv6Network) -> None:
        # Kubernetes hands out neither the first address nor, in IPv4, the broadcast address
        size = max(0, network.num_addresses - (2 if network.version == 4 else 1))
        super().__init__(size, static_band(size, 16, 16, 256))
        self.network = network
        self._base = int(network.network_address) + 1

    def offset(self, address: str) -> int | None:
        parsed = ip_address(address)
        if parsed.version != self.network.version:
            return None
        offset = int(parsed) - self._base
        return offset if 0 <= offset < self._size else None

    def address(self, offset: int) -> str:
        return str(self.network[offset + 1])


class _PortPool(_Pool):
    def __init__(self, ports: range) -> None:
        super().__init__(len(ports), static_band(len(ports), 32, 16, 128))
        self.ports = ports


class ServiceAllocator:
    """Decides; commits nothing. One for each API server process."""

    def __init__(self, ranges: ServiceRanges, choose: Choose) -> None:
        self._ranges, self._choose = ranges, choose
        self._addresses = {f"IPv{n.version}": _AddressPool(n) for n in ranges.cluster}
        self._ports = _PortPool(ranges.node_ports)

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
        reserved: set[str] = set()
        try:
            self._assign_addresses(spec, before, reserved)
            self._assign_ports(spec, before, reserved)
        except (AllocationFailed, RangeFull):
            self._forget(reserved)
            raise
        return Allocation(service, tuple(sorted(reserved)), tuple(sorted(before - held(service))))

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
        pools: tuple[_Pool, ...] = tuple(self._addresses.values()) if prefix == IP_PREFIX else (self._ports,)
        for pool in pools:
            pool.taken.clear()
        self.load(keys)

    def repair(self, keys: Iterable[str], services: Iterable[Json]) -> tuple[list[str], list[str]]:
        """Keys to put (held by a Service, not in the store) and to delete (held by none), for start-up."""
        stored, wanted = set(keys), set[str]().union(*(held(service) for service in services))
        self._forget(stored - wanted)
        self.load(wanted)
        return sorted(wanted - stored), sorted(stored - wanted)

    def follow(self, key: str, *, taken: bool) -> None:
        """The store says that `key` is there, or is not: another server may have taken it, or given it back."""
        self._mark(key, taken=taken)

    # --- addresses

    def _assign_addresses(self, spec: Json, before: set[str], reserved: set[str]) -> None:
        if spec.get("type") == "ExternalName" or spec.get("clusterIP") == "None":
            return
        wished = list(spec.get("clusterIPs") or [])
        for address in wished:
            key = ip_key(address)
            if key not in before:
                self._take_address(address, wished, reserved)
        for family in spec.get("ipFamilies", [])[len(wished) :]:
            pool = self._addresses[family]
            offset = pool.pick(self._choose)
            if offset is None:
                raise RangeFull("failed to allocate a serviceIP: range is full")
            wished.append(pool.address(offset))
            self._reserve(ip_key(wished[-1]), reserved)
        spec["clusterIPs"], spec["clusterIP"] = wished, wished[0]

    def _take_address(self, address: str, wished: list[str], reserved: set[str]) -> None:
        pool = self._addresses[family_of(address)]
        offset = pool.offset(address)
        problem = ""
        if offset is None:
            problem = f"the provided IP ({address}) is not in the valid range. The range of valid IPs is {pool.network}"
        elif offset in pool.taken:
            problem = "provided IP is already allocated"
        if problem:
            text = f"failed to allocate IP {address}: {problem}"
            raise AllocationFailed([invalid(_SPEC / "clusterIPs", wished, text)])
        self._reserve(ip_key(address), reserved)

    # --- node ports

    def _assign_ports(self, spec: Json, before: set[str], reserved: set[str]) -> None:
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

    def _take_port(self, port: int, at: Path, before: set[str], reserved: set[str]) -> None:
        key = port_key(port)
        if key in before or key in reserved:
            return
        ports = self._ports.ports
        if port not in ports:
            text = f"provided port is not in the valid range. The range of valid ports is {ports[0]}-{ports[-1]}"
            raise AllocationFailed([invalid(at, port, text)])
        if port - ports.start in self._ports.taken:
            raise AllocationFailed([invalid(at, port, "provided port is already allocated")])
        self._reserve(key, reserved)

    def _pick_port(self, what: str, reserved: set[str]) -> int:
        offset = self._ports.pick(self._choose)
        if offset is None:
            raise RangeFull(f"failed to allocate a {what}: range is full")
        port = self._ports.ports[offset]
        self._reserve(port_key(port), reserved)
        return port

    # --- bookkeeping

    def _reserve(self, key: str, reserved: set[str]) -> None:
        self._mark(key, taken=True)
        reserved.add(key)

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._mark(key, taken=False)

    def _mark(self, key: str, *, taken: bool) -> None:
        pool: _Pool
        offset: int | None
        if key.startswith(IP_PREFIX):
            address = key.removeprefix(IP_PREFIX)
            found = self._addresses.get(family_of(address))
            if found is None:
                return
            pool, offset = found, found.offset(address)
        elif not key.startswith(PORT_PREFIX):
            return  # kube-apiserver's own records lie beside ours
        else:
            pool, port = self._ports, int(key.removeprefix(PORT_PREFIX))
            offset = port - self._ports.ports.start if port in self._ports.ports else None
        if offset is not None:
            (pool.taken.add if taken else pool.taken.discard)(offset)


def _shared(port: Json, ports: list[Json]) -> int:
    """The node port of another port of the Service with the same number and another protocol (as DNS has); 0 if none."""
    for other in ports:
        if other is not port and other.get("nodePort") and other.get("port") == port.get("port"):
            users = [p for p in ports if p.get("nodePort") == other["nodePort"]]
            if all(p.get("protocol", "TCP") != port.get("protocol", "TCP") for p in users):
                return int(other["nodePort"])
    return 0
