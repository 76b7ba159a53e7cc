"""What the controllers are told at start."""

import ipaddress
from dataclasses import dataclass, field

from podwire.model.addr import IPNetwork
from podwire.model.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class ClusterCidr:
    """The pods' range of one family, and the length of the prefix that each node gets of it."""

    network: IPNetwork
    node_prefix: int

    def __post_init__(self) -> None:
        if not self.network.prefixlen <= self.node_prefix <= self.network.max_prefixlen:
            raise InvalidInput(
                f"pod range {self.network}: a node's prefix of /{self.node_prefix} does not fit in; "
                f"choose one from /{self.network.prefixlen} to /{self.network.max_prefixlen}"
            )

    @property
    def size(self) -> int:
        """How many nodes it serves."""
        return 1 << (self.node_prefix - self.network.prefixlen)


@dataclass(frozen=True, slots=True)
class ControllersConfig:
    """Times in seconds. `cluster_cidrs` and `load_balancer_pools` hold at most one entry per family (IPv4 first where dual).

    `ca_certificate` is the PEM text for the ConfigMap kube-root-ca.crt. `node_grace` is how long a node's Lease may stay
    without renewal before the node counts as unreachable; `eviction_after` when its pods are deleted then.
    `slice_interval` bounds how often the EndpointSlices of one Service are written under a burst of changes.
    """

    cluster_cidrs: tuple[ClusterCidr, ...] = ()
    load_balancer_pools: tuple[IPNetwork, ...] = ()
    ca_certificate: str = ""
    node_grace: float = 40.0
    eviction_after: float = 300.0
    slice_interval: float = 0.02
    disabled: frozenset[str] = field(default_factory=frozenset)
    """Names of controllers that shall not run (their function is someone else's), as `podwire.controllers.run.NAMES`."""


def default_cluster_cidr(network: str) -> ClusterCidr:
    """`network` with the usual prefix per node: /24 for IPv4, /64 for IPv6. Raises InvalidInput."""
    try:
        parsed = ipaddress.ip_network(network)
    except ValueError as error:
        raise InvalidInput(f"pod range {network!r} is no network ({error}); write it like 10.244.0.0/16") from error
    return ClusterCidr(parsed, 24 if parsed.version == 4 else 64)
