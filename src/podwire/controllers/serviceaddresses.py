"""ServiceCIDRs and IPAddresses kept in step with the Services, as Kubernetes' ServiceCIDR controller and its repair loop do.

The API server takes an address in the same commit as the Service, out of a range that is ready in that commit. So nothing is
put right here but what somebody has changed by hand, and two things are relied on: an address without its Service is nobody's,
and once a ServiceCIDR's deletion is on record, no further address comes out of it.

Service and IPAddress come by different watches. What looks wrong may be old news of the one and new of the other: it is looked
at again a little later, and then asked for.
"""

import contextlib
import ipaddress
import logging
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

import msgspec

from podwire.client.errors import NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, Controller
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.objects import Service
from podwire.model.resources import IPADDRESSES, SERVICECIDRS, SERVICES, Resource
from podwire.model.servicecidr import (
    FAMILY_LABEL,
    FINALIZER,
    READY,
    IPAddressObject,
    ServiceCIDR,
    address_document,
    covered,
    ready_condition,
    terminating_condition,
)
from podwire.model.timestamps import format_time

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.25
"""How long what looks wrong is given to come right by itself: the other watch's news are on their way."""


class Subject(NamedTuple):
    """A Service, an IPAddress or a ServiceCIDR. `again`: it has looked wrong once already."""

    resource: Resource
    key: ObjectKey
    again: bool = False


def addresses_of(service: Service) -> tuple[str, ...]:
    """The ClusterIPs that a Service holds."""
    if service.spec.type == "ExternalName":
        return ()
    return tuple(text for text in service.spec.cluster_ips or (service.spec.cluster_ip,) if text and text != "None")


def uncovered(going: ServiceCIDR, ranges: Iterable[ServiceCIDR], addresses: Iterable[IPAddressObject]) -> Iterator[IPAddress]:
    """The Services' addresses that would be in no range, were `going` not there."""
    others = [network for cidr in ranges if cidr.serves and cidr.key != going.key for network in cidr.networks]
    for found in addresses:
        address = found.address
        if address and found.managed and covered(address, going.networks) and not covered(address, others):
            yield address


class ServiceAddresses(Controller[Subject]):
    name: ClassVar[str] = "serviceaddresses"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.on(self.cluster.service_cidrs, self._range_changed)
        self.on(self.cluster.ip_addresses, self._address_changed)
        self.on(self.cluster.services, self._service_changed)

    def _range_changed(self, change: Change[ServiceCIDR]) -> None:
        self.queue.add(Subject(SERVICECIDRS, change.key))
        self._look_at_those_going()
        if change.old is not None and change.new is None:
            for key, service in self.cluster.services.items().items():
                if self._outside(service):
                    self.queue.add(Subject(SERVICES, key))

    def _address_changed(self, change: Change[IPAddressObject]) -> None:
        if change.new is None:
            self._look_at_those_going()
        found = change.object
        service = self._parent(found)
        if service is not None and found.metadata.name in addresses_of(service):
            # Somebody's change of an address that has its Service is that Service's matter.
            if not self._right(found.metadata.name, service):
                self.queue.add(Subject(SERVICES, service.key))
        elif change.new is not None and found.managed:
            self.queue.add(Subject(IPADDRESSES, change.key))

    def _service_changed(self, change: Change[Service]) -> None:
        if change.new is None:
            return
        if not all(self._right(address, change.new) for address in addresses_of(change.new)) or self._outside(change.new):
            self.queue.add(Subject(SERVICES, change.key))

    def _look_at_those_going(self) -> None:
        for key, cidr in self.cluster.service_cidrs.items().items():
            if cidr.terminating:
                self.queue.add(Subject(SERVICECIDRS, key))

    async def sync(self, key: Subject) -> None:
        if key.resource == SERVICECIDRS:
            await self._sync_range(key.key)
        elif key.resource == SERVICES:
            await self._sync_service(key)
        else:
            await self._sync_address(key)

    # --- ranges

    async def _sync_range(self, key: ObjectKey) -> None:
        cidr = self.cluster.service_cidrs.get(key)
        if cidr is None:
            return
        now = format_time(self.context.now())
        if not cidr.terminating:
            if FINALIZER not in cidr.metadata.finalizers:
                await self._set_finalizers(cidr, (*cidr.metadata.finalizers, FINALIZER))
            if not cidr.ready:
                await self._set_condition(cidr, ready_condition(key.name, now))
            return
        if FINALIZER not in cidr.metadata.finalizers:
            return
        if any(uncovered(cidr, self.cluster.service_cidrs.items().values(), self.cluster.ip_addresses.items().values())):
            if cidr.ready:
                await self._set_condition(cidr, terminating_condition(now))
            return
        # The informers may be behind; the answer to a list is not, and what it does not show cannot come any more.
        addresses, ranges = await self.client.list(IPADDRESSES), await self.client.list(SERVICECIDRS)
        known = msgspec.convert(addresses.items, list[IPAddressObject]), msgspec.convert(ranges.items, list[ServiceCIDR])
        if any(uncovered(cidr, known[1], known[0])):
            self.queue.add_after(Subject(SERVICECIDRS, key), SETTLE_SECONDS)
            return
        await self._set_finalizers(cidr, (f for f in cidr.metadata.finalizers if f != FINALIZER))

    async def _set_finalizers(self, cidr: ServiceCIDR, finalizers: Iterable[str]) -> None:
        meta = cidr.metadata
        change = {"uid": meta.uid, "resourceVersion": meta.resource_version, "finalizers": list(finalizers)}
        await self._patch(SERVICECIDRS, meta.name, {"metadata": change})

    async def _set_condition(self, cidr: ServiceCIDR, condition: Json) -> None:
        others = [msgspec.to_builtins(c) for c in cidr.status.conditions if c.type != READY]
        patch = {"metadata": {"uid": cidr.metadata.uid}, "status": {"conditions": [*others, condition]}}
        await self._patch(SERVICECIDRS, cidr.metadata.name, patch, subresource="status")

    async def _patch(self, resource: Resource, name: str, patch: Json, *, subresource: str = "") -> None:
        with contextlib.suppress(NotFound):  # it went meanwhile, as it should
            await self.client.patch(resource, name, patch, subresource=subresource)

    # --- Services

    def _parent(self, found: IPAddressObject) -> Service | None:
        """The Service that the address says it is of."""
        parent = found.spec.parent_ref
        if parent is None or parent.group or parent.resource != "services":
            return None
        return self.cluster.services.get(ObjectKey(parent.namespace, parent.name))

    def _right(self, address: str, service: Service) -> bool:
        """Whether the address has an object which says that it is this Service's."""
        found = self.cluster.ip_addresses.get(ObjectKey("", address))
        return found is not None and _labelled(found) and self._parent(found) is service

    def _outside(self, service: Service) -> list[str]:
        """Those of the Service's addresses that no ServiceCIDR covers."""
        networks: list[IPNetwork] = [n for cidr in self.cluster.service_cidrs.items().values() for n in cidr.networks]
        return [text for text in addresses_of(service) if not covered(ipaddress.ip_address(text), networks)]

    async def _sync_service(self, key: Subject) -> None:
        service = self.cluster.services.get(key.key)
        if service is None:
            return
        wrong = [address for address in addresses_of(service) if not self._right(address, service)]
        outside = self._outside(service)
        if (wrong or outside) and not key.again:
            self.queue.add_after(key._replace(again=True), SETTLE_SECONDS)
            return
        for address in outside:
            text = f"{_family(address)}: {address} is not within any configured Service CIDR; please recreate service"
            self._warn(service, "ClusterIPOutOfRange", f"Cluster IP {text}")
        for address in wrong:
            await self._mend(service, address)

    async def _mend(self, service: Service, address: str) -> None:
        """Makes sure that the Service's address has its object. Raises ApiError."""
        current = msgspec.convert(await self.client.get(SERVICES, service.key.name, service.key.namespace), Service)
        if address not in addresses_of(current):
            return
        document = address_document(address, *service.key)
        try:
            found = msgspec.convert(await self.client.get(IPADDRESSES, address), IPAddressObject)
        except NotFound:
            self._warn(
                service, "ClusterIPNotAllocated", f"Cluster IP {_family(address)}: {address} is not allocated; repairing"
            )
            await self.client.create(IPADDRESSES, document)
            return
        holder = self._parent(found)
        if holder is not None and holder.key != service.key and address in addresses_of(holder):
            text = f"Cluster IP {_family(address)}: {address} was assigned to multiple services; please recreate service"
            self._warn(service, "ClusterIPAlreadyAllocated", text)
        elif holder is None or holder.key != service.key:
            text = f"the ClusterIP {_family(address)}: {address} for Service {service.key} has a wrong reference; repairing"
            self._warn(service, "ClusterIPNotAllocated", text)
            await self.client.delete(IPADDRESSES, address, uid=found.metadata.uid)
            await self.client.create(IPADDRESSES, document)
        elif not _labelled(found):
            labels = {"uid": found.metadata.uid, "labels": document["metadata"]["labels"]}
            await self._patch(IPADDRESSES, address, {"metadata": labels})

    def _warn(self, service: Service, reason: str, message: str) -> None:
        log.warning("service %s: %s", service.key, message)
        self.events.record(SERVICES, service.metadata, "Warning", reason, message)

    # --- addresses

    async def _sync_address(self, key: Subject) -> None:
        """One that is managed and not its Service's: it goes, with an Event that says why. Raises ApiError."""
        found = self.cluster.ip_addresses.get(key.key)
        if found is None or not found.managed or self._held(found):
            return
        if not key.again:
            self.queue.add_after(key._replace(again=True), SETTLE_SECONDS)
            return
        parent = found.spec.parent_ref
        address, of = found.metadata.name, f"{parent.namespace}/{parent.name}" if parent else "nobody"
        reason, text = "IPAddressNotAllocated", f"IPAddress: {address} for Service {of} appears to have leaked: cleaning up"
        if parent is None or parent.group or parent.resource != "services":
            text = f"IPAddress: {address} appears to have been modified, not referencing a Service {of}: cleaning up"
        else:
            try:
                service = msgspec.convert(await self.client.get(SERVICES, parent.name, parent.namespace), Service)
            except NotFound:
                pass
            else:
                if address in addresses_of(service):
                    return
                reason = "IPAddressWrongReference"
                text = f"IPAddress: {address} for Service {of} has a wrong reference; cleaning up"
        log.warning("%s", text)
        self.events.record(IPADDRESSES, found.metadata, "Warning", reason, text)
        with contextlib.suppress(NotFound):  # the Service went, and its address with it
            await self.client.delete(IPADDRESSES, address, uid=found.metadata.uid)

    def _held(self, found: IPAddressObject) -> bool:
        service = self._parent(found)
        return service is not None and found.metadata.name in addresses_of(service)


def _family(address: str) -> str:
    return "[IPv6]" if ":" in address else "[IPv4]"


def _labelled(found: IPAddressObject) -> bool:
    return found.managed and found.metadata.labels.get(FAMILY_LABEL) == _family(found.metadata.name).strip("[]")
