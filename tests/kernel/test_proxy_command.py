"""`podwire proxy` as a process on a node that is somebody else's: packets, probes, repair, modes, and how it ends."""

import asyncio
import json
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from proxysite import HEALTH, METRICS, WEB, Site, proxy_site, remove_rules, until
from servicerig import FACTS

from podwire.client.errors import NotFound
from podwire.kernel.iptables import Flavour, find_programs
from podwire.kernel.netns import run_in_netns
from podwire.model.acknowledgement import NAMESPACE, lease_name
from podwire.model.addr import Family
from podwire.model.flow import Flow
from podwire.model.resources import ENDPOINTSLICES, LEASES, SERVICES
from podwire.plan.services import TABLE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.timeout(90),
]


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with proxy_site(tmp_path) as made:
        yield made


async def _leads(site: Site) -> None:
    """The Service from a pod, from outside, and at the health-check port."""
    rig = site.rig
    assert await rig.who("p4", WEB, 80, times=40) == {"p2", "p3", "far"}
    assert await rig.who("world", "198.18.0.11", 30080, times=20) == {"p2", "p3"}
    status, body = await site.get("world", "198.18.0.11", 30999, "/")
    assert (status, json.loads(body)["localEndpoints"]) == (200, 2)


async def test_a_proxy_serves_repairs_and_leaves(site: Site) -> None:
    async with site.proxy() as process:
        await _leads(site)
        assert await site.get("node", "127.0.0.1", METRICS, "/proxyMode") == (200, "nftables")
        connections = await site.metric('podwire_service_connections_total{namespace="default",service="web"')
        assert connections == 60
        assert await site.metric("podwire_endpoint_connections_total", "/metrics/endpoints") == 60
        await remove_rules(site.rig)
        assert await until(site.answers, process) < 1.0

        async def counted() -> bool:
            return await site.metric("podwire_proxy_repairs_total") == 1

        await until(counted, process)
        other = await asyncio.to_thread(site.command("--master", "http://127.0.0.1:1").communicate)
        assert "another podwire proxy serves this host already" in other[1]
        process.send_signal(signal.SIGTERM)
        _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0, said
        assert "rules were not as left" in said
        assert "the rules stay" in said
    assert await site.answers()
    assert await site.client.get(LEASES, lease_name(FACTS.name), NAMESPACE), "it has given its word"
    master = f"http://127.0.0.1:{site.port}"
    status, said = await site.outcome(site.command("--cleanup", "--master", master, "--hostname-override", FACTS.name))
    assert status == 0, said
    assert "the API says" not in said
    with pytest.raises(NotFound):
        await site.client.get(LEASES, lease_name(FACTS.name), NAMESPACE)
    assert not await site.answers()
    assert not (await site.rig.kernel.observe_nft(TABLE)).tables


async def test_all_addresses_are_those_of_both_families(site: Site) -> None:
    async with site.proxy("--metrics-bind-address", "[::]:10249"):
        for port, path in ((HEALTH, "/livez"), (METRICS, "/proxyMode")):
            for host in ("127.0.0.1", "::1"):
                assert (await site.get("node", host, port, path))[0] == 200


async def test_what_a_configuration_of_elsewhere_lacks_here_is_said(site: Site, tmp_path: Path) -> None:
    """kubeadm's names files that are in kube-proxy's pod only."""
    config = tmp_path / "config.conf"
    config.write_text("clientConnection: {kubeconfig: /nowhere/kubeconfig.conf}")
    status, said = await site.outcome(site.command("--config", str(config)))
    assert status == 1
    assert f"Error: {config}: clientConnection.kubeconfig: /nowhere/kubeconfig.conf: cannot be read" in said
    assert "(--kubeconfig names another)" in said
    status, said = await site.outcome(site.command("--config", str(config), "--hostname-override", "my_host"))
    assert (status, "Error: --hostname-override 'my_host' is no name that a Node can have" in said) == (1, True), said


async def test_a_configuration_that_changes_ends_it_to_be_started_anew(site: Site, tmp_path: Path) -> None:
    config = tmp_path / "config.conf"
    config.write_text("clusterCIDR: 10.244.0.0/16")
    async with site.proxy("--config", str(config)) as process:
        config.write_text("clusterCIDR: 10.245.0.0/16")
        status, said = await site.outcome(process)
        assert (status, f"Error: {config} has changed: this ends, to be started anew" in said) == (1, True), said
        assert await site.answers(), "the rules stay"


async def test_switches_that_cannot_be_set_are_said(site: Site) -> None:
    """A namespace of its own may not set the machine's size of the connection table."""
    status, said = await site.outcome(site.command("--init-only", "--conntrack-min=1000"))
    assert (status, "Error: setting net/netfilter/nf_conntrack_max to" in said) == (1, True), said
    liberal = ("--conntrack-max-per-core=0", "--conntrack-tcp-be-liberal")
    status, said = await site.outcome(site.command("--init-only", *liberal))
    assert (status, "nf_conntrack_tcp_be_liberal to 1" in said) == (0, True), said


async def test_a_policy_that_no_rule_of_nftables_outweighs_is_said(site: Site) -> None:
    if find_programs(Flavour.NFT) is None:
        pytest.skip("iptables (nft) is not installed")
    policy = ["/usr/sbin/iptables-nft", "-P", "FORWARD", "DROP"]
    run_in_netns(site.rig.fds["node"], lambda: subprocess.run(policy, check=True, capture_output=True))
    async with site.proxy() as process:
        _, said = await site.end(process)
        assert "iptables (nft) drops what is forwarded" in said
    async with site.proxy("--proxy-mode", "iptables") as process:
        assert await site.metric("kubeproxy_iptables_ct_state_invalid_dropped_packets_total") == 0
        _, said = await site.end(process)
        assert "drops what is forwarded" not in said
        assert said.count("Services go through iptables") == 1, said


async def test_a_datagrams_client_follows_its_service(site: Site) -> None:
    """One socket, one tracked connection: it is moved on when its endpoint goes, and refused when the last has gone."""
    async with site.proxy():
        with site.rig.open("p4", socket.SOCK_DGRAM, WEB) as sock:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (WEB, 53))

            async def who() -> str:
                await loop.sock_sendall(sock, b"who?")
                async with asyncio.timeout(1):
                    return (await loop.sock_recv(sock, 100)).decode().split()[0]

            addresses = {"p2": "10.244.1.2", "p3": "10.244.1.3", "far": "10.244.2.2"}
            first = await who()
            assert await who() == first
            del addresses[first]
            rest = [{"addresses": [ip], "nodeName": FACTS.name} for ip in addresses.values()]
            await site.client.patch(ENDPOINTSLICES, "web-1", {"endpoints": rest}, "default")

            async def moved() -> bool:
                return await who() in addresses

            await until(moved)
            await site.client.delete(SERVICES, "web", "default")

            async def gone() -> bool:
                try:
                    await who()
                except (ConnectionRefusedError, PermissionError, TimeoutError):
                    return True
                return False

            await until(gone)


async def test_a_datagrams_client_follows_its_endpoints_port(site: Site) -> None:
    async with site.proxy():
        await site.rig.serve("far", Family.IPV4, 9999)
        there = [{"addresses": ["10.244.2.2"], "nodeName": "n2"}]
        await site.client.patch(ENDPOINTSLICES, "web-1", {"endpoints": there}, "default")
        loop = asyncio.get_running_loop()
        with site.rig.open("p4", socket.SOCK_DGRAM, WEB) as sock:
            await loop.sock_connect(sock, (WEB, 53))

            async def port() -> int:
                """Of the endpoint that the tracked connection leads to, once it answers from there."""
                await loop.sock_sendall(sock, b"who?")
                async with asyncio.timeout(1):
                    await loop.sock_recv(sock, 100)
                seen = []

                def look(flow: Flow) -> bool:
                    if flow.original.protocol == socket.IPPROTO_UDP and flow.original.dport == 53:
                        seen.append((str(flow.reply.src), flow.reply.sport))
                    return False

                await site.rig.kernel.forget_flows(look)
                return seen[0][1] if [ip for ip, _ in seen] == ["10.244.2.2"] else 0

            async def led(to: int) -> bool:
                return await port() == to

            await until(lambda: led(8080))
            ports = [{"name": "http", "port": 8080}, {"name": "dns", "port": 9999, "protocol": "UDP"}]
            await site.client.patch(ENDPOINTSLICES, "web-1", {"ports": ports}, "default")
            await until(lambda: led(9999))


async def test_what_is_no_server_is_said(site: Site) -> None:
    for master in ("foo bar", "ftp://10.0.0.1", "http://"):
        status, said = await site.outcome(site.command("--master", master))
        assert (status, f"--master: {master!r} is no URL of an API server" in said) == (1, True), said


async def test_another_mode_takes_over_with_the_next_start(site: Site) -> None:
    if find_programs(Flavour.NFT) is None:
        pytest.skip("iptables (nft) is not installed")
    async with site.proxy():
        await _leads(site)
    async with site.proxy("--proxy-mode", "iptables"):
        await _leads(site)
        assert (await site.get("node", "127.0.0.1", METRICS, "/proxyMode"))[1] == "iptables"
        assert await site.metric('podwire_service_connections_total{namespace="default",service="web"') == 60
        assert await site.metric("podwire_endpoint_connections_total", "/metrics/endpoints") == 60
        assert await site.metric('kubeproxy_sync_proxy_rules_iptables_total{ip_family="IPv4",table="nat"}') > 20

        async def alone() -> bool:
            return not (await site.rig.kernel.observe_nft(TABLE)).tables

        await until(alone)
        await _leads(site)
