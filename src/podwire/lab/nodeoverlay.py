"""Which subnet manager and back end the nodes of a lab use, made from the lab's spec."""

import ipaddress
from pathlib import Path
from random import Random

from podwire.agent.health import Health
from podwire.agent.nodeoverlay import Overlay
from podwire.agent.overlayd.files import wireguard_keys
from podwire.agent.overlayd.host import LinuxHost
from podwire.agent.overlayd.tunnelkeeper import TunnelKeeper
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.kube import KubeSubnets
from podwire.agent.subnets.port import SubnetManager
from podwire.client.api import ApiClient
from podwire.client.etcd import EtcdClient
from podwire.client.informer import Informer
from podwire.lab.spec import UNDERLAY, LabSpec
from podwire.lab.topology import FABRIC_MTU, UPLINK, Place
from podwire.model.netconf import NetConfig, WireguardBackend, parse_net_config
from podwire.model.objects import Node
from podwire.plan.backends import Backend, UdpTunnel, Underlay, WireguardKeys, make_backend


def node_overlay(
    spec: LabSpec, place: Place, host: LinuxHost, folder: Path, client: ApiClient, etcd: EtcdClient | None
) -> Overlay | None:
    """For one life of a node's agent; `client` and `etcd` (where that is the subnet manager) are the caller's to close.
    None: the agent's own defaults will do. `folder` keeps a WireGuard key."""
    if not spec.own_overlay:
        return None
    underlay = _underlay(place)

    def backend(config: NetConfig) -> Backend:
        keys = wireguard_keys(folder / "wgkey") if isinstance(config.backend, WireguardBackend) else None
        return make_backend(config, underlay, place.name, keys)

    def tunnel(backend: UdpTunnel, health: Health) -> TunnelKeeper:
        return TunnelKeeper(host, backend, health, Random())

    if etcd is None:
        config = parse_net_config(spec.network_config, source="lab network", leased=False)

        def kube(nodes: Informer[Node]) -> SubnetManager:
            return KubeSubnets(nodes, place.name, config, client=client)

        return Overlay(subnets=kube, backend=backend, tunnel=tunnel)

    def leased(_: Informer[Node]) -> SubnetManager:
        return EtcdSubnets(etcd)

    return Overlay(subnets=leased, backend=backend, tunnel=tunnel)


def check_backend(spec: LabSpec, place: Place) -> None:
    """Raises InvalidInput for a back end that no node of the lab could use, as none could at `place`."""
    config = parse_net_config(spec.network_config, source="lab network", leased=False)
    make_backend(config, _underlay(place), place.name, WireguardKeys(private="", public=""))


def _underlay(place: Place) -> Underlay:
    addresses = tuple(place.addresses.items())
    return Underlay(
        device=UPLINK,
        mtu=FABRIC_MTU,
        interfaces=tuple(ipaddress.ip_interface(f"{address}/{UNDERLAY[f].prefixlen}") for f, address in addresses),
        public=tuple(address for _, address in addresses),
    )
