"""`podwire agent` as a process on two hosts, with Debian's etcd: files, health, metrics, packets, and how it ends."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from etcdrig import Member, answers, need_etcd
from labcommand import PODWIRE
from overlayrig import OverlayHost, carries, config_text, overlay_hosts, until

from podwire.client.etcd import EtcdClient
from podwire.kernel.netns import run_in_netns
from podwire.kernel.syscalls import CLONE_NEWNET, setns
from podwire.model.addr import Family

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "nftables")]

ETCD, HEALTH = 2379, 9999
URL = f"http://192.0.2.1:{ETCD}"


@asynccontextmanager
async def etcd_on(host: OverlayHost, config: str) -> AsyncIterator[None]:
    """etcd on the host's own address, with the configuration in it."""
    need_etcd()
    peer = "http://127.0.0.1:2380"
    member = Member(host.folder, "solo", URL, peer, ("--initial-cluster", f"solo={peer}"), netns=host.netns)
    await member.start()
    try:
        async with EtcdClient([URL], socket_factory=partial(_socket_in, host.netns)) as client:
            await answers(client)
            await client.put("/coreos.com/network/config", config.encode())
            yield
    finally:
        await member.end()


def _socket_in(netns: int, info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
    return run_in_netns(netns, lambda: socket.socket(info[0], info[1], info[2]))


@contextmanager
def agent_on(host: OverlayHost, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The command in the host's namespace, its options half in the environment."""
    environment = {
        **os.environ,
        "FLANNELD_ETCD_ENDPOINTS": URL,
        "FLANNELD_IFACE": "eth0",
        "FLANNELD_SUBNET_FILE": str(host.folder / "subnet.env"),
        "FLANNELD_IPTABLES_FORWARD_RULES": "false",
    }
    process = subprocess.Popen(
        [*PODWIRE, "agent", "--node-name", f"n{host.index}", "--healthz-port", str(HEALTH), *arguments],
        env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: setns(host.netns, CLONE_NEWNET),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(host: OverlayHost, path: str) -> tuple[int, str]:
    """(status, body); status 0 while nobody listens."""
    with run_in_netns(host.netns, socket.socket) as sock:
        sock.settimeout(5)
        try:
            sock.connect(("127.0.0.1", HEALTH))
        except OSError:
            return 0, ""
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


async def ready(host: OverlayHost, peers: int) -> bool:
    status, _ = await asyncio.to_thread(ask, host, "/readyz")
    return status == 200 and f"podwire_overlay_peers {peers}" in (await asyncio.to_thread(ask, host, "/metrics"))[1]


async def test_two_hosts_join_through_etcd(tmp_path: Path) -> None:
    families = (Family.IPV4, Family.IPV6)
    config = config_text({"Type": "vxlan"}, families)
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(overlay_hosts(tmp_path, config))
        await stack.enter_async_context(etcd_on(one, config))
        docker = tmp_path / "docker.env"
        first = stack.enter_context(agent_on(one, "--ip-masq", "--docker-options-file", str(docker)))
        stack.enter_context(agent_on(two, "--ip-masq=false"))
        for host in (one, two):
            await until(partial(ready, host, 1), 20)
            await host.add_pod()
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


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ('{"Network":"10.5.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}', (), "SubnetLen 31 leaves no room for pods"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"ipsec"}}', (), "backend type 'ipsec'"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}', ("--iface", "eth7"), "there are eth0 (192.0.2.1/24"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}', ("--public-ip", "203.0.113.1"), "is not eth0's own"),
        ("", ("--subnet-manager", "kube"), "give --kubeconfig-file"),
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
