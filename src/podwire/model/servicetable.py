"""What a Service asks of a node, as a value: frontends, each with the pools of backends that its traffic may go to.

Every back end (nftables, later iptables and IPVS) programs the same `ServiceTable`. A node holds one for each Service of
the cluster: the types are msgspec's, which are made and compared in a fraction of a dataclass's time.
"""

import enum
from dataclasses import dataclass

import msgspec

from podwire.model.addr import IPAddress, IPNetwork


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What planning Services on a node needs to know about it.

    `node_ips`: the addresses that node ports and host ports listen on. `pod_cidrs`: this node's own. `cluster_cidrs`: all
    pods of the cluster. `service_cidrs`: where ClusterIPs come from. `zone`: topology.kubernetes.io/zone.
    `local_sources`: whose traffic counts as that of a pod of this node (kube-proxy's detectLocalMode); empty: `pod_cidrs`.
    `local_interfaces`: instead of addresses, the devices it comes in by: names, or beginnings of names followed by "*".
    `masquerade_all`: whoever uses a ClusterIP is seen with the node's address. `loopback`: node ports and host ports also
    listen on 127.0.0.1; needs the sysctl route_localnet (IPv6 has no such switch, so nothing listens on ::1)."""

    name: str
    node_ips: tuple[IPAddress, ...]
    pod_cidrs: tuple[IPNetwork, ...] = ()
    cluster_cidrs: tuple[IPNetwork, ...] = ()
    service_cidrs: tuple[IPNetwork, ...] = ()
    zone: str = ""
    local_sources: tuple[IPNetwork, ...] = ()
    local_interfaces: tuple[str, ...] = ()
    masquerade_all: bool = False
    loopback: bool = False

    @property
    def local_pods(self) -> tuple[IPNetwork, ...]:
        """Sources that are treated as pods of this node; none where `local_interfaces` tell them."""
        if self.local_interfaces:
            return ()
        return self.local_sources or self.pod_cidrs

    def tells_pods(self, version: int) -> bool:
        """Whether this node's pods can be told from other clients of IP `version`. Where not, nobody is masqueraded for being
        none (kube-proxy's `localDetector.IsImplemented`)."""
        return bool(self.local_interfaces) or any(network.version == version for network in self.local_pods)


Backend = bytes
"""One endpoint, packed: its address (4 or 16 bytes), its port (2, network order), two zeros.

Bytes and no object, because a node holds one for every endpoint of the cluster; it is also what a map's element holds."""


def backend(address: bytes, port: int) -> Backend:
    return address + port.to_bytes(4, "big")[2:] + b"\0\0"


def backend_address(packed: Backend) -> bytes:
    return packed[:-4]


def backend_port(packed: Backend) -> int:
    return int.from_bytes(packed[-4:-2], "big")


class FrontendKind(enum.Enum):
    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_IP = "ExternalIP"
    HOST_PORT = "HostPort"


class Pool(msgspec.Struct, frozen=True, gc=False):
    """Backends in a stable order. Where there are none, traffic is refused, or (`drop`) silently dropped, since another
    node has some: a balancer's health check shall move on, not tell the client that nobody is there."""

    backends: tuple[Backend, ...] = ()
    drop: bool = False


class Frontend(msgspec.Struct, frozen=True, gc=False):
    """An address and port that clients connect to.

    `address` is packed, `protocol` the IP protocol number. `inside`: for traffic of this node's pods and processes;
    `outside`: for all other, None where it is the same. `masquerade`: the source is rewritten for everyone.
    `affinity_s`: clients stay with their backend for so long after the last connection; 0: they do not.
    `source_ranges`: (first, last) packed addresses of those who may come in; None: anyone. `port_name`: the Service's port;
    with `protocol` it tells which frontends are the same port at different addresses. `inside_local`: `inside` are this node's
    backends only; those of `outside` always are."""

    address: bytes
    protocol: int
    port: int
    kind: FrontendKind
    inside: Pool
    outside: Pool | None = None
    masquerade: bool = False
    affinity_s: int = 0
    source_ranges: tuple[tuple[bytes, bytes], ...] | None = None
    port_name: str = ""
    inside_local: bool = False

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Of both pools; one that is in both comes twice."""
        return (*self.inside.backends, *self.outside.backends) if self.outside is not None else self.inside.backends


class ServiceTable(msgspec.Struct, frozen=True, gc=False):
    """All frontends of one Service (or of one Pod's host ports).

    `local_addresses`: the backends that run on this node, or that no node is named for. `cluster_ips`: addresses that belong to
    the Service alone, so that any other port of theirs is closed. `health_check_port`: where balancers ask if this node has
    endpoints; 0: nowhere. `local_ready`: how many of its pods on this node are ready, for the answer."""

    frontends: tuple[Frontend, ...] = ()
    local_addresses: frozenset[bytes] = frozenset()
    cluster_ips: tuple[bytes, ...] = ()
    health_check_port: int = 0
    local_ready: int = 0
