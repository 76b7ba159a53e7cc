"""`podwire agent` as a process on two hosts, with Debian's etcd: files, health, metrics, packets, and how it ends."""

import asyncio
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
from agentrig import API, CONFIG_KEY, agent_on, api_on, ask, etcd_on, ready
from overlayrig import OverlayHost, carries, config_text, overlay_hosts, until

from podwire.client.api import ApiClient
from podwire.model.addr import Family
from podwire.model.resources import NODES

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "nftables")]


async def test_two_hosts_join_through_etcd(tmp_path: Path) -> None:
    families = (Family.IPV4, Family.IPV6)
    config = config_text({"Type": "vxlan"}, families)
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(overlay_hosts(tmp_path, config))
        etcd = await stack.enter_async_context(etcd_on(one, config))
        docker = tmp_path / "docker.env"
        systemd = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        first = stack.enter_context(
            agent_on(
                one, "--ip-masq", "--docker-options-file", str(docker), environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}
            )
        )
        stack.enter_context(agent_on(two, "--ip-masq=false"))
        for host in (one, two):
            await until(partial(ready, host, 1), 20)
            await host.add_pod()
        assert systemd.recv(100) == b"READY=1"
        for family in families:
            await carries(one, two, family)
        assert (one.subnet_env["FLANNEL_IPMASQ"], two.subnet_env["FLANNEL_IPMASQ"]) == ("true", "false")
        assert f"--bip={one.subnet_env['FLANNEL_SUBNET']}" in docker.read_text()
        assert ask(one, "/healthz") == (200, "ok\n")
        assert "podwire_overlay_lease_held 1" in ask(one, "/metrics")[1]
        before = (await one.kernel.observe()).routes
        first.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(first.wait, 10) == 0
        assert (await one.kernel.observe()).routes == before  # the pods' connections go on
        await carries(one, two, Family.IPV4)
        await etcd.put(CONFIG_KEY, config_text({"Type": "host-gw"}, families).encode())
        await until(partial(_says, two, 'podwire_overlay_info{backend="host-gw"} 1'), 20)
        await until(lambda: two.mtu == 1500)


async def _says(host: OverlayHost, metric: str) -> bool:
    return metric in (await asyncio.to_thread(ask, host, "/metrics"))[1]


async def test_two_hosts_join_through_their_nodes(tmp_path: Path) -> None:
    """The "kube" manager: subnets are podCIDRs, what peers must know stands in flannel's annotations."""
    families = (Family.IPV4, Family.IPV6)
    config = tmp_path / "net-conf.json"
    config.write_text(config_text({"Type": "vxlan"}, families))
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(overlay_hosts(tmp_path, config.read_text()))
        client = await stack.enter_async_context(api_on(hosts[0]))
        for host in hosts:
            cidrs = [f"10.5.{host.index}.0/24", f"fd05:0:0:{host.index}::/64"]
            unavailable = {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}
            document = {"metadata": {"name": f"n{host.index}"}, "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}}
            await client.create(
                NODES, {"apiVersion": "v1", "kind": "Node", **document, "status": {"conditions": [unavailable]}}
            )
            where = ("--kube-api-url", f"http://192.0.2.1:{API}", "--net-config-path", str(config))
            stack.enter_context(agent_on(host, "--kube-subnet-mgr", *where))
        for host in hosts:
            await until(partial(ready, host, 1), 20)
            await host.add_pod()
        for family in families:
            await carries(hosts[0], hosts[1], family)
        node = await client.get(NODES, "n1")
        told = {key.removeprefix("flannel.alpha.coreos.com/"): text for key, text in node["metadata"]["annotations"].items()}
        mac = (await hosts[0].kernel.observe()).links["flannel.1"].mac
        assert told["backend-data"] == f'{{"VNI":1,"VtepMAC":"{mac}"}}'
        assert (told["kube-subnet-manager"], told["backend-type"], told["public-ip"]) == ("true", "vxlan", "192.0.2.1")
        await until(partial(_is_available, client, "n1"))


async def _is_available(client: ApiClient, name: str) -> bool:
    node = await client.get(NODES, name)
    return any(c["type"] == "NetworkUnavailable" and c["status"] == "False" for c in node["status"]["conditions"])


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"ipsec"}}', (), "podwire has no back end 'ipsec'"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}', ("--iface", "eth7"), "there are eth0 (192.0.2.1/24"),
        ("", ("--subnet-manager", "kube"), "give a kubeconfig"),
    ],
)
async def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, config: str, arguments: tuple[str, ...], words: str) -> None:
    async with AsyncExitStack() as stack:
        (host,) = await stack.enter_async_context(overlay_hosts(tmp_path, config, 1))
        if config:
            await stack.enter_async_context(etcd_on(host, config))
        process = stack.enter_context(agent_on(host, *arguments))
        _, errors = await asyncio.to_thread(process.communicate, None, 20)
        assert process.returncode == 1
        assert words in errors.splitlines()[-1]
        assert "Traceback" not in errors


async def test_a_second_agent_is_refused(tmp_path: Path) -> None:
    config = config_text({"Type": "vxlan"}, (Family.IPV4,))
    async with AsyncExitStack() as stack:
        (host,) = await stack.enter_async_context(overlay_hosts(tmp_path, config, 1))
        await stack.enter_async_context(etcd_on(host, config))
        stack.enter_context(agent_on(host))
        await until(partial(ready, host, 0), 20)
        second = stack.enter_context(agent_on(host))
        _, errors = await asyncio.to_thread(second.communicate, None, 20)
        assert second.returncode == 1
        assert "another agent works with" in errors
