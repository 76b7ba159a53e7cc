"""`podwire cluster-agent` at its start: by which addresses the node is known, with and without the API."""

import asyncio
import ipaddress
from pathlib import Path

import pytest

from podwire.client.api import ApiClient
from podwire.hosts import guest
from podwire.model.kernelstate import Address, Device, Link
from podwire.model.ops import AddAddress
from podwire.model.resources import NODES
from podwire.testing.fakekernel import FakeKernel
from podwire.testing.memorycluster import memory_cluster

ADDRESS = ipaddress.ip_address("198.18.0.11")


async def machine() -> FakeKernel:
    kernel = FakeKernel(Link("eth0", Device()))
    await kernel.apply((AddAddress(Address("eth0", ipaddress.ip_interface(f"{ADDRESS}/15"))),))
    return kernel


async def test_the_nodes_addresses_are_remembered(tmp_path: Path) -> None:
    networks = (ipaddress.ip_network("10.244.0.0/16"),)
    options = guest.GuestOptions(node="n1", cluster_cidrs=networks, service_cidrs=(), state=tmp_path / "state")
    async with memory_cluster(tmp_path) as cluster, ApiClient(cluster.url) as client:
        kernel = await machine()
        await client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
        addresses = {"addresses": [{"type": "InternalIP", "address": str(ADDRESS)}]}
        await client.patch(NODES, "n1", {"status": addresses}, subresource="status")
        assert await guest._node_addresses(client, options, kernel) == (ADDRESS,)
        async with cluster.outage():
            assert await guest._node_addresses(client, options, kernel) == (ADDRESS,)
            with pytest.raises(TimeoutError):  # the machine does not have them any more: wait for the API
                async with asyncio.timeout(0.3):
                    await guest._node_addresses(client, options, FakeKernel(Link("eth0", Device())))
