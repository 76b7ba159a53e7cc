"""Where `podwire verify overlay` finds the leases of the hosts: etcd, or an API server's Nodes."""

from collections.abc import Mapping
from typing import Any

import msgspec

from podwire.agent.subnets.etcd import boot_time
from podwire.agent.subnets.registry import DEFAULT_TTL, LeaseRegistry
from podwire.cli.etcdaccess import etcd_client
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model.objects import Node
from podwire.model.resources import NODES
from podwire.plan.leases import Lease, lease_of_node


async def leases_from(store: Mapping[str, Any]) -> dict[str, Lease]:
    """`store`: the command's options by name. Raises what the store answers."""
    if store["kubeconfig_file"]:
        async with client_from_kubeconfig(store["kubeconfig_file"], user_agent="podwire/verify") as client:
            listed = await client.list(NODES)
        found = [lease_of_node(msgspec.convert(item, Node), store["kube_annotation_prefix"]) for item in listed.items]
        return {lease.node: lease for lease in found if lease is not None}
    async with etcd_client(store) as etcd:
        snapshot = await LeaseRegistry(etcd, store["etcd_prefix"], DEFAULT_TTL, boot_time).list()
    return {stored.lease.node: stored.lease for stored in snapshot.leases}
