"""What an agent is told when it is made; everything else it learns from the API and the kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from podwire import __version__
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.proxymode import ProxyMode
from podwire.plan.overlay import DEFAULT_PORT, DEFAULT_VNI


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """One node's agent.

    node_ips: the node's addresses on the underlay, at most one of each family, the preferred first.
    state_dir: holds the record of address reservations; belongs to this node alone and must survive agent restarts.
    nameservers: what pods get as resolvers (the cluster DNS Service's addresses); empty: the node's own.
    service_cidrs: where ClusterIPs come from, while the API server tells no other ranges (ServiceCIDRs).
    routed_pods: route between the node's pods even where the kernel could bridge (see `plan.node.bridge_switches`).
    cni_socket: where container engines are served, through the CNI plugin (cniserver.DEFAULT_SOCKET); None: they are not.
    guest: the node is a kubelet's, which has registered it and runs its pods; the agent is its network only.
    services: False: another proxy serves the Services, but for those that ask for "podwire" by the label
      service.kubernetes.io/service-proxy-name.
    mirror: show engines' containers as Pods in the API; not where a kubelet runs them, whose Pods they are.
    proxy_mode: what serves Services; another than nftables needs `NodeAgent`'s `modes`.
    patience_seconds: after the start, before engines are served by what the node remembers of its network.
    service_route: see `plan.node.NodeNetwork`; wanted where the node has no default route.
    """

    node_name: str
    node_ips: tuple[IPAddress, ...]
    cluster_cidrs: tuple[IPNetwork, ...]
    service_cidrs: tuple[IPNetwork, ...]
    state_dir: Path
    uplink: str = "eth0"
    underlay_mtu: int = 1500
    vni: int = DEFAULT_VNI
    vxlan_port: int = DEFAULT_PORT
    service_route: bool = False
    routed_pods: bool = False
    proxy_mode: ProxyMode = ProxyMode.NFTABLES
    cni_socket: Path | None = None
    guest: bool = False
    services: bool = True
    mirror: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    nameservers: tuple[IPAddress, ...] = ()
    cluster_domain: str = "cluster.local"
    kubelet_port: int = 10250
    kubelet_version: str = f"v1.36.0+podwire.{__version__}"
    max_pods: int = 110
    cpus: int = 2
    memory_bytes: int = 4 << 30
    heartbeat_seconds: float = 10.0
    lease_seconds: int = 40
    patience_seconds: float = 2.0
