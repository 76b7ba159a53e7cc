"""IPVS mode makes a Service's address the node's own. What its nftables do about that needs no IPVS to be seen."""

import ipaddress

import pytest
from service_cases import service_of, slice_of, to_ipv6
from servicerig import FACTS, service_rig

from podwire.agent.proxymodes.nft import commit, remove_tables
from podwire.model.addr import Family
from podwire.model.ids import HOST
from podwire.model.kernelstate import Address
from podwire.model.ops import AddAddress
from podwire.plan.ipvs import IpvsPlanner
from podwire.plan.services import TABLE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
async def test_the_nodes_processes_are_refused_at_once(family: Family) -> None:
    turn = str if family is Family.IPV4 else to_ipv6
    cluster_ip = turn("10.96.0.10")
    short = {"name": "web", "clusterIP": cluster_ip, "ports": [{"port": 80, "targetPort": 8080}]}
    item = {"service": short, "endpoints": [{"ip": turn("10.244.1.2"), "node": "n1"}]}
    async with service_rig(patience_s=5.0) as rig:
        await remove_tables(rig.kernel, TABLE)
        planner = IpvsPlanner(FACTS)
        service = service_of(short, family)
        planner.set_service(service.key, service, (slice_of(item, family),))
        await commit(rig.kernel, planner.take().batch)
        await rig.kernel.apply((AddAddress(Address("lo", ipaddress.ip_interface(cluster_ip)), HOST),))
        for where in ("node", "p4", "world"):
            with pytest.raises(ConnectionRefusedError):
                await rig.ask(where, cluster_ip, 4711)
