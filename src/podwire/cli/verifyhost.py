"""Where `podwire verify overlay` finds the leases of the hosts: etcd, or an API server's Nodes."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import msgspec

from podwire.agent.subnets.etcd import boot_time
from podwire.agent.subnets.registry import DEFAULT_TTL, LeaseRegistry
from podwire.cli.etcdaccess import etcd_client
from podwire.client.api import ApiClient
from podwire.client.errors import Forbidden
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model.objects import Node, Pod
from podwire.model.resources import NODES, PODS
from podwire.plan.leases import Lease, lease_of_node
from podwire.trace.overlaycheck import PodAddress


@dataclass(frozen=True, slots=True)
class Known:
    """What the store knows. `pods` is None where it knows none of them."""

    leases: Mapping[str, Lease]
    pods: tuple[PodAddress, ...] | None = None


async def read_store(store: Mapping[str, Any]) -> Known:
    """`store`: the command's options by name. Raises what the store answers."""
    if store["kubeconfig_file"]:
        async with client_from_kubeconfig(store["kubeconfig_file"], user_agent="podwire/verify") as client:
            nodes = await client.list(NODES)
            pods = await _pods(client)
        found = [lease_of_node(msgspec.convert(item, Node), store["kube_annotation_prefix"]) for item in nodes.items]
        return Known({lease.node: lease for lease in found if lease is not None}, pods)
    async with etcd_client(store) as etcd:
        snapshot = await LeaseRegistry(etcd, store["etcd_prefix"], DEFAULT_TTL, boot_time).list()
    return Known({stored.lease.node: stored.lease for stored in snapshot.leases})


async def _pods(client: ApiClient) -> tuple[PodAddress, ...] | None:
    """The addresses of all running pods; None for whom may not list them (a node's own account)."""
    try:
        listed = await client.list(PODS)
    except Forbidden:
        return None
    pods = (msgspec.convert(item, Pod) for item in listed.items)
    running = [pod for pod in pods if not pod.spec.host_network and pod.status.phase in ("Pending", "Running")]
    return tuple(PodAddress(str(pod.key), pod.spec.node_name, ip_address(text)) for pod in running for text in pod.ips)
