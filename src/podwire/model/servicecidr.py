"""Where ClusterIPs come from (ServiceCIDR) and who has which (IPAddress): networking.k8s.io/v1 of Kubernetes 1.33, KEP-1880."""

import ipaddress
from collections.abc import Iterable

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.meta import Json
from podwire.model.objects import ApiObject, Condition, View
from podwire.model.resources import IPADDRESSES

FINALIZER = "networking.k8s.io/service-cidr-finalizer"
"""Keeps a ServiceCIDR that is being deleted until no address would be left without a range."""
FAMILY_LABEL = "ipaddress.kubernetes.io/ip-family"
MANAGED_LABEL = "ipaddress.kubernetes.io/managed-by"
MANAGER = "ipallocator.k8s.io"

READY = "Ready"
TERMINATING = "Terminating"


class ServiceCIDRSpec(View, frozen=True):
    cidrs: tuple[str, ...] = ()


class ServiceCIDRStatus(View, frozen=True):
    conditions: tuple[Condition, ...] = ()


class ServiceCIDR(ApiObject, frozen=True):
    spec: ServiceCIDRSpec = ServiceCIDRSpec()
    status: ServiceCIDRStatus = ServiceCIDRStatus()

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        """Without what is no network."""
        return tuple(network for text in self.spec.cidrs if (network := _network(text)))

    @property
    def ready(self) -> bool:
        return any(c.type == READY and c.status == "True" for c in self.status.conditions)

    @property
    def terminating(self) -> bool:
        return self.metadata.deletion_timestamp is not None

    @property
    def serves(self) -> bool:
        """Whether addresses are given out of it."""
        return self.ready and not self.terminating


class ParentReference(View, frozen=True):
    group: str = ""
    resource: str = ""
    namespace: str = ""
    name: str = ""


class IPAddressSpec(View, frozen=True):
    parent_ref: ParentReference | None = None


class IPAddressObject(ApiObject, frozen=True):
    """Its name is the address."""

    spec: IPAddressSpec = IPAddressSpec()

    @property
    def address(self) -> IPAddress | None:
        try:
            return ipaddress.ip_address(self.metadata.name)
        except ValueError:
            return None

    @property
    def managed(self) -> bool:
        """Whether it goes with a Service; others are somebody's own reservations."""
        return self.metadata.labels.get(MANAGED_LABEL) == MANAGER


def ready_condition(name: str, now: str) -> Json:
    """Of the ServiceCIDR `name`, while addresses are given out of it. `now`: as the API writes time."""
    message = "Kubernetes default Service CIDR is ready" if name == "kubernetes" else "Kubernetes Service CIDR is ready"
    return {"type": READY, "status": "True", "reason": "", "message": message, "lastTransitionTime": now}


def terminating_condition(now: str) -> Json:
    """While its deletion waits for the addresses that it alone covers."""
    message = "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR"
    return {"type": READY, "status": "False", "reason": TERMINATING, "message": message, "lastTransitionTime": now}


def address_document(address: str, namespace: str, name: str) -> Json:
    """The IPAddress by which Service `namespace/name` has `address`."""
    labels = {FAMILY_LABEL: "IPv6" if ":" in address else "IPv4", MANAGED_LABEL: MANAGER}
    return {
        "apiVersion": IPADDRESSES.api_version,
        "kind": IPADDRESSES.kind,
        "metadata": {"name": address, "labels": labels},
        "spec": {"parentRef": {"resource": "services", "namespace": namespace, "name": name}},
    }


def usable(network: IPNetwork) -> range:
    """The addresses, as numbers, that Services may have: not the first one nor, in IPv4, the broadcast address."""
    first = int(network.network_address)
    return range(first + 1, first + max(1, network.num_addresses - (1 if network.version == 4 else 0)))


def covered(address: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    """Whether a Service may have `address` out of one of `networks`."""
    return any(network.version == address.version and int(address) in usable(network) for network in networks)


def _network(text: str) -> IPNetwork | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None
