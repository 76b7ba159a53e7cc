"""`podwire verify overlay` on a host, against etcd and against an API server: silent when all is well, and it names what is
not."""

import asyncio
import json
import subprocess
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from agentrig import API, URL, agent_on, api_on, etcd_on, ready, socket_in
from labcommand import PODWIRE
from overlayrig import OverlayHost, config_text, overlay_hosts, until

from podwire.client.api import ApiClient
from podwire.client.etcd import EtcdClient
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.syscalls import CLONE_NEWNET, setns
from podwire.model.addr import Family
from podwire.model.ops import DelFdb, Op
from podwire.model.resources import NODES, PODS
from podwire.trace.overlaycheck import AGREED, FITTING, KEPT, MAPPED, UNIQUE

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "nftables")]

DUAL = (Family.IPV4, Family.IPV6)
SOUND = {MAPPED: 2, AGREED: 4, KEPT: 2, FITTING: 2, UNIQUE: 1}
"""Of two hosts with two subnets each: two addresses of its own; two ways and two MACs; two packets; two edges."""


@dataclass(frozen=True)
class Report:
    status: int
    findings: list[dict[str, Any]]

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(f["condition"] for f in self.findings if f["ok"]))

    @property
    def wrong(self) -> list[dict[str, Any]]:
        return [f for f in self.findings if f["ok"] is False]


async def verify(host: OverlayHost, *arguments: str) -> Report:
    done = await asyncio.to_thread(
        subprocess.run, [*PODWIRE, "verify", "overlay", "-o", "json", *arguments],
        capture_output=True, text=True, check=False, timeout=60, preexec_fn=lambda: setns(host.netns, CLONE_NEWNET),
    )  # fmt: skip
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is (done.returncode == 0)
    return Report(done.returncode, report["findings"])


async def test_against_etcd(tmp_path: Path) -> None:
    config = config_text({"Type": "vxlan"}, DUAL)
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(overlay_hosts(tmp_path, config))
        await stack.enter_async_context(etcd_on(one, config))
        for host in (one, two):
            process = stack.enter_context(agent_on(host, "--ip-masq"))
        for host in (one, two):
            await until(partial(ready, host, 1), 20)
        sound = await verify(one, "--etcd-endpoints", URL)
        assert (sound.status, sound.counts, sound.wrong) == (0, SOUND, [])
        evidence = "\n".join(f["evidence"] for f in sound.findings)
        source, target = (str(host.pod_address(Family.IPV4) - 2) for host in (one, two))
        assert f"from {source} to {target}: left eth0 as {source}, and was answered" in evidence
        assert "flannel.1 says 1450: 1450 bytes to" in evidence
        assert "1451 bytes too big" in evidence
        process.kill()  # nobody repairs on the second host from now on
        await asyncio.to_thread(process.wait)
        await _its_entry_is_gone(stack, two)
        await _lease(one, f"{source}-25", "192.0.2.9")
        broken = await verify(two, "--etcd-endpoints", URL)
        assert broken.status == 1
        words = "\n".join(f"{f['condition']}: {f['evidence']}" for f in broken.wrong)
        assert f"{_mac(sound)} has no forwarding entry on flannel.1" in words
        assert f"{UNIQUE}: {source}/24 of" in words
        assert f"overlaps {source}/25" in words
        assert {f["condition"] for f in broken.wrong} == {AGREED, KEPT, FITTING, UNIQUE}, words


async def _its_entry_is_gone(stack: AsyncExitStack, host: OverlayHost) -> None:
    stranger = LinuxKernel(host.netns)
    stack.push_async_callback(stranger.close)
    entries = [entry for entry in (await stranger.observe()).fdb if entry.dev == "flannel.1"]
    ops: tuple[Op, ...] = tuple(map(DelFdb, entries))
    assert (await stranger.apply(ops)).ok


def _mac(sound: Report) -> str:
    """What the first host says of its own IPv4 tunnel."""
    words = next(f["evidence"] for f in sound.findings if "flannel.1 has" in f["evidence"] and f["condition"] == AGREED)
    return str(words.partition(" has ")[2].partition(";")[0])


async def _lease(host: OverlayHost, key: str, address: str) -> None:
    async with EtcdClient([URL], socket_factory=partial(socket_in, host.netns)) as client:
        await client.put(f"/coreos.com/network/subnets/{key}", json.dumps({"PublicIP": address}).encode())


async def test_against_an_api_server(tmp_path: Path) -> None:
    config = tmp_path / "net-conf.json"
    config.write_text(config_text({"Type": "host-gw"}, DUAL))
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(overlay_hosts(tmp_path, config.read_text()))
        client = await stack.enter_async_context(api_on(hosts[0]))
        server = f"http://192.0.2.1:{API}"
        for host in hosts:
            cidrs = [f"10.5.{host.index}.0/24", f"fd05:0:0:{host.index}::/64"]
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{host.index}"}}
            await client.create(NODES, node | {"spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}})
            where = ("--kube-api-url", server, "--net-config-path", str(config), "--kube-annotation-prefix", "example.org/net")
            stack.enter_context(agent_on(host, "--kube-subnet-mgr", *where))
        for host in hosts:
            await until(partial(ready, host, 1), 20)
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(_kubeconfig(server))
        look = partial(verify, hosts[0], "--kubeconfig-file", str(kubeconfig), "--kube-annotation-prefix", "example.org/net")
        await _pod(client, "astray", "n2", "10.5.1.9")
        first = await look()
        assert first.status == 1, "without pods nobody answers there"
        assert {f["condition"] for f in first.wrong} == {FITTING, MAPPED}
        assert "10.5.1.9 lies in the subnet of n1; the pod runs on n2" in [f["evidence"] for f in first.wrong]
        assert [f["ok"] for f in first.findings if f["condition"] == KEPT] == [None]
        await client.delete(PODS, "astray", "default", grace_period_seconds=0)
        for host in hosts:
            await host.add_pod()
        sound = await look()
        assert (sound.status, sound.wrong) == (0, [])
        assert sound.counts == SOUND | {AGREED: 2}


async def _pod(client: ApiClient, name: str, node: str, ip: str) -> None:
    spec = {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}
    await client.create(PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}, "default")
    status = {"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}}
    await client.patch(PODS, name, status, "default", subresource="status")


def _kubeconfig(server: str) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
    )
