"""Addresses for Services of type LoadBalancer out of pools, one a family: given, kept, requested, released, never shared."""

import ipaddress
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from podwire.client.errors import NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, Controller, all_of
from podwire.controllers.slices import families
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.objects import Service
from podwire.model.resources import SERVICES

log = logging.getLogger(__name__)


@dataclass(slots=True)
class AddressPlan:
    """`assign`: Services whose status is wrong → the addresses it must have. `refused`: why a Service gets none."""

    assign: dict[ObjectKey, tuple[IPAddress, ...]] = field(default_factory=dict)
    refused: dict[ObjectKey, str] = field(default_factory=dict)


def plan_addresses(services: Iterable[Service], pools: Sequence[IPNetwork]) -> AddressPlan:
    """What each Service has stays if it may; of two with the same address the older keeps it. Requests come before choice."""
    plan = AddressPlan()
    by_version: dict[int, IPNetwork] = {pool.version: pool for pool in pools}
    wanting: list[Service] = []
    for service in services:
        if _wants(service):
            wanting.append(service)
        elif service.spec.type != "LoadBalancer" and current_addresses(service):
            plan.assign[service.key] = ()
    wanting.sort(key=lambda service: (service.metadata.creation_timestamp or "", service.key))
    taken: set[IPAddress] = set()
    given = {service.key: _kept(service, by_version, taken) for service in wanting}
    for service in wanting:
        _give_requested(service, by_version, given[service.key], taken, plan)
    free = {version: _free(pool, taken) for version, pool in by_version.items()}
    for service in wanting:
        if service.key in plan.refused:
            continue
        for version in _versions(service):
            if version not in given[service.key] and version in by_version:
                address = next(free[version], None)
                if address is None:
                    plan.refused[service.key] = (
                        f"no address is free in {by_version[version]}; delete a Service or widen the pool"
                    )
                    break
                given[service.key][version] = address
                taken.add(address)
    for service in wanting:
        addresses = tuple(given[service.key][v] for v in _versions(service) if v in given[service.key])
        if addresses != current_addresses(service):
            plan.assign[service.key] = addresses
    return plan


def _wants(service: Service) -> bool:
    return (
        service.spec.type == "LoadBalancer"
        and service.spec.load_balancer_class is None
        and service.metadata.deletion_timestamp is None
    )


def _versions(service: Service) -> tuple[int, ...]:
    return tuple(4 if family == "IPv4" else 6 for family in families(service))


def current_addresses(service: Service) -> tuple[IPAddress, ...]:
    found = (_address(entry.ip) for entry in service.status.load_balancer.ingress)
    return tuple(address for address in found if address is not None)


def _requested(service: Service) -> IPAddress | None:
    return _address(service.spec.load_balancer_ip)


def _address(text: str) -> IPAddress | None:
    """None for nothing, and for what is no address."""
    try:
        return ipaddress.ip_address(text) if text else None
    except ValueError:
        return None


def _kept(service: Service, pools: dict[int, IPNetwork], taken: set[IPAddress]) -> dict[int, IPAddress]:
    """The addresses that the Service has and may keep; they are taken from now on."""
    kept: dict[int, IPAddress] = {}
    request = _requested(service)
    for address in current_addresses(service):
        pool = pools.get(address.version)
        fits = pool is not None and address in pool and address.version in _versions(service)
        other = request is not None and request.version == address.version and request != address
        if fits and not other and address not in taken and address.version not in kept:
            kept[address.version] = address
            taken.add(address)
    return kept


def _give_requested(
    service: Service, pools: dict[int, IPNetwork], given: dict[int, IPAddress], taken: set[IPAddress], plan: AddressPlan
) -> None:
    request = _requested(service)
    if request is None or given.get(request.version) == request:
        return
    pool = pools.get(request.version)
    if request.version not in _versions(service):
        plan.refused[service.key] = f"spec.loadBalancerIP {request} is of a family that the Service does not have"
    elif pool is None or request not in pool:
        plan.refused[service.key] = (
            f"spec.loadBalancerIP {request} is not in the pool {pool or 'of that family (there is none)'}"
        )
    elif request in taken:
        plan.refused[service.key] = f"spec.loadBalancerIP {request} is in use by another Service"
    else:
        given[request.version] = request
        taken.add(request)


def _free(pool: IPNetwork, taken: set[IPAddress]) -> Iterator[IPAddress]:
    """Free addresses in order, without the network's first and (IPv4) last."""
    return (address for address in pool.hosts() if address not in taken and address != pool.network_address)


class LoadBalancers(Controller[str]):
    """One key stands for all Services: who gets what depends on all the others."""

    name: ClassVar[str] = "loadbalancers"
    workers: ClassVar[int] = 1

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.on(self.cluster.services, self._service_changed)

    def _service_changed(self, change: Change[Service]) -> None:
        old, new = change.old, change.new
        if any(s is not None and (s.spec.type == "LoadBalancer" or s.status.load_balancer.ingress) for s in (old, new)):
            self.queue.add("all")

    async def sync(self, key: str) -> None:
        if not self.context.config.load_balancer_pools:
            return
        services = self.cluster.services.items()
        plan = plan_addresses(services.values(), self.context.config.load_balancer_pools)
        for refused, reason in plan.refused.items():
            self.events.record(SERVICES, services[refused].metadata, "Warning", "AllocationFailed", reason)
        # Releases first: with them a lost answer never leaves an address with two.
        order = sorted(plan.assign.items(), key=lambda entry: len(entry[1]))
        written = [w for w in await all_of(self._write(services[k], addresses) for k, addresses in order) if w]
        for document in written:
            await self.cluster.services.caught_up(document)

    async def _write(self, service: Service, addresses: Sequence[IPAddress]) -> Json | None:
        ingress = [{"ip": str(address), "ipMode": "VIP"} for address in addresses]
        balancer: Json = {"ingress": ingress} if ingress else {"ingress": None}
        patch: Json = {"metadata": {"uid": service.metadata.uid}, "status": {"loadBalancer": balancer}}
        meta = service.metadata
        try:
            written = await self.client.patch(SERVICES, meta.name, patch, meta.namespace, subresource="status")
        except NotFound:
            return None
        log.info("service %s: load-balancer address %s", service.key, ", ".join(map(str, addresses)) or "released")
        return written
