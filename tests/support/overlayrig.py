"""Hosts with overlay agents, on one underlay: a network namespace each, joined by a bridge, and a pod on each host.

    host n: eth0 192.0.2.n/24, 2001:db8::n/64   pod: the second address of the host's subnets, MTU from subnet.env

The pods' links are nobody's but the test's, as if another CNI plugin had made them. All neighbours are permanent: the kernel's
table of those that it learns is one for all namespaces of a machine, and labs that run beside the tests may fill it.
"""

import asyncio
import ipaddress
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from echoes import socket_family, tcp_call, tcp_echo
from overlayrun import run_until_left

from podwire.agent.overlayd.agent import OverlayAgent, OverlayOptions
from podwire.agent.overlayd.host import LinuxHost
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns, run_in_netns
from podwire.model.addr import Family, IPAddress, IPNetwork, family_of
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Device, Link, Neighbour, NetState, Route, Veth
from podwire.model.netconf import NetConfig
from podwire.model.ops import AddAddress, AddLink, ChangeLink, Op, SetNeighbour, SetRoute, SetSysctl
from podwire.plan.diff import diff
from podwire.plan.underlay import Wish
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient

NETWORKS = {Family.IPV4: "10.5.0.0/16", Family.IPV6: "fd05::/48"}
_GATEWAY_MAC, _POD_MAC = "02:00:00:00:0a:01", "02:00:00:00:0a:02"
_STATIC = 4
"""A route's protocol: not podwire's."""


def config_text(backend: dict[str, Any], families: Sequence[Family]) -> str:
    document: dict[str, Any] = {"Network": NETWORKS[Family.IPV4], "Backend": backend}
    if Family.IPV6 in families:
        document |= {"EnableIPv6": True, "IPv6Network": NETWORKS[Family.IPV6]}
    return json.dumps(document)


def host_address(index: int, family: Family) -> str:
    return f"192.0.2.{index}/24" if family is Family.IPV4 else f"2001:db8::{index:x}/64"


def _host_ip(index: int, family: Family) -> IPAddress:
    return ipaddress.ip_interface(host_address(index, family)).ip


def _host_mac(index: int) -> str:
    return f"02:00:00:00:00:{index:02x}"


class _Unmoved(EtcdSubnets):
    """As flanneld, which reads the configuration once."""

    async def next_config(self) -> NetConfig:
        return await asyncio.Future()


@dataclass
class OverlayHost:
    """One host; `agent` while it runs one. `pod`: the namespace of its pod, once it has one."""

    index: int
    netns: int
    kernel: LinuxKernel
    folder: Path
    etcd: FakeEtcd
    fabric: LinuxKernel
    agent: OverlayAgent | None = None
    pod: int = -1

    @property
    def subnet_env(self) -> dict[str, str]:
        text = (self.folder / "subnet.env").read_text()
        return dict(line.split("=", 1) for line in text.splitlines())

    def pod_address(self, family: Family) -> IPAddress:
        key = "FLANNEL_SUBNET" if family is Family.IPV4 else "FLANNEL_IPV6_SUBNET"
        return ipaddress.ip_interface(self.subnet_env[key]).ip + 1

    @property
    def mtu(self) -> int:
        return int(self.subnet_env["FLANNEL_MTU"])

    @asynccontextmanager
    async def running(self, *, follows: bool = True, **options: Any) -> AsyncIterator[OverlayAgent]:
        """The agent, once it has programmed the host. Its end is awaited. `follows`: changes of the configuration, too."""
        settings: dict[str, Any] = {
            "node": f"n{self.index}",
            "subnet_file": self.folder / "subnet.env",
            "wireguard_key": self.folder / "wgkey",
            "forward_rules": False,
            "wish": Wish(names=("eth0",)),
        }
        manager = EtcdSubnets if follows else _Unmoved
        subnets = manager(FakeEtcdClient(self.etcd), rng=Random(self.index))
        agent = OverlayAgent(OverlayOptions(**(settings | options)), self.kernel, subnets, LinuxHost(self.netns))
        async with run_until_left(agent):
            self.agent = agent
            try:
                yield agent
            finally:
                self.agent = None

    async def add_pod(self) -> None:
        """A pod with an address out of each subnet, its gateway on the host's end of the link."""
        self.pod = create_netns()
        label = NetnsName("pod")
        self.kernel.attach(label, self.pod)
        names = {Family.IPV4: "FLANNEL_SUBNET", Family.IPV6: "FLANNEL_IPV6_SUBNET"}
        env = self.subnet_env
        gateways = [ipaddress.ip_interface(env[name]) for name in names.values() if name in env]
        ops: list[Op] = [
            *(SetSysctl("net/ipv6/conf/default/accept_dad", "0", ns) for ns in (HOST, label)),
            AddLink(
                Link("pod0", Veth("eth0", label), mtu=self.mtu, mac=_GATEWAY_MAC),
                Link("eth0", Veth("pod0", HOST), mtu=self.mtu, mac=_POD_MAC),
            ),
            ChangeLink(Link("lo", Device()), label),
        ]
        for gateway in gateways:
            own = ipaddress.ip_interface(f"{gateway.ip + 1}/{gateway.network.prefixlen}")
            ops += [AddAddress(Address("pod0", gateway)), AddAddress(Address("eth0", own), label)]
            ops += [
                SetNeighbour(Neighbour("pod0", own.ip, _POD_MAC)),
                SetNeighbour(Neighbour("eth0", gateway.ip, _GATEWAY_MAC), label),
            ]
            ops.append(SetRoute(Route(family_of(gateway).any, dev="eth0", via=gateway.ip, protocol=_STATIC), label))
        applied = await self.kernel.apply(tuple(ops))
        self.kernel.detach(label)
        assert applied.ok, applied.failures

    async def plug(self, families: Sequence[Family] = tuple(Family)) -> None:
        """Give the host an interface again after its own was removed."""
        label, port = NetnsName(f"n{self.index}"), f"port{self.index}"
        addresses = (Address("eth0", ipaddress.ip_interface(host_address(self.index, family))) for family in families)
        ops: tuple[Op, ...] = (
            AddLink(
                Link(port, Veth("eth0", label), master="fabric", alias="podwire"),
                Link("eth0", Veth(port, HOST), mac=_host_mac(self.index)),
            ),
            *(AddAddress(address, label) for address in addresses),
        )
        applied = await self.fabric.apply(ops)
        assert applied.ok, applied.failures

    async def close(self) -> None:
        await self.kernel.close()
        if self.pod >= 0:
            os.close(self.pod)
        os.close(self.netns)


@asynccontextmanager
async def overlay_hosts(
    folder: Path, config: str, count: int = 2, families: Sequence[Family] = tuple(Family)
) -> AsyncIterator[list[OverlayHost]]:
    """Hosts without agents, and the configuration in an etcd that all of them use."""
    etcd = FakeEtcd()
    await FakeEtcdClient(etcd).put("/coreos.com/network/config", config.encode())
    fds = {index: create_netns() for index in range(1, count + 1)}
    async with AsyncExitStack() as stack:
        fabric_fd = create_netns()
        stack.callback(os.close, fabric_fd)
        fabric = LinuxKernel(fabric_fd)
        stack.push_async_callback(fabric.close)
        links: dict[str, Link] = {"fabric": Link("fabric", Bridge(), alias="podwire")}
        states: dict[NetnsName, NetState] = {}
        for index, fd in fds.items():
            label = NetnsName(f"n{index}")
            fabric.attach(label, fd)
            links[f"port{index}"] = Link(f"port{index}", Veth("eth0", label), master="fabric", alias="podwire")
            addresses = (Address("eth0", ipaddress.ip_interface(host_address(index, family))) for family in families)
            uplink = Link("eth0", Veth(f"port{index}", HOST), mac=_host_mac(index))
            others = ((other, family) for other in fds if other != index for family in families)
            neighbours = (Neighbour("eth0", _host_ip(other, family), _host_mac(other)) for other, family in others)
            undoubted = {"net/ipv6/conf/default/accept_dad": "0"}  # it costs two seconds
            links_of = {"eth0": uplink, "lo": Link("lo", Device())}
            states[label] = NetState(
                links=links_of, addresses=frozenset(addresses), neighbours=frozenset(neighbours), sysctls=undoubted
            )
        applied = await fabric.apply(diff({HOST: NetState(links=links), **states}, {}))
        assert applied.ok, applied.failures
        hosts = []
        for index, fd in fds.items():
            place = folder / f"n{index}"
            place.mkdir()
            host = OverlayHost(index, fd, LinuxKernel(fd), place, etcd, fabric)
            stack.push_async_callback(host.close)
            hosts.append(host)
        yield hosts


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 10.0) -> None:
    """Wait for the condition, looking every few milliseconds."""
    async with asyncio.timeout(seconds):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.02)


def udp_fits(sender: int, receiver: int, source: IPAddress, target: IPAddress, packet: int) -> bool:
    """Whether an IP packet of `packet` bytes arrives whole, unfragmented, from pod to pod."""
    payload = bytes(packet - (28 if target.version == 4 else 48))
    sink = run_in_netns(receiver, lambda: socket.socket(socket_family(target), socket.SOCK_DGRAM))
    out = run_in_netns(sender, lambda: socket.socket(socket_family(target), socket.SOCK_DGRAM))
    with sink, out:
        sink.bind((str(target), 9999))
        sink.settimeout(1.0)
        level, option = (socket.IPPROTO_IP, 10) if target.version == 4 else (socket.IPPROTO_IPV6, 23)
        out.setsockopt(level, option, 2)  # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER: IP_PMTUDISC_DO
        if target.version == 6:
            out.setsockopt(level, 62, 1)  # IPV6_DONTFRAG: say so at once
        out.bind((str(source), 0))
        try:
            out.sendto(payload, (str(target), 9999))
            return sink.recvfrom(65536)[0] == payload
        except (TimeoutError, OSError):
            return False


async def carries(one: OverlayHost, two: OverlayHost, family: Family) -> None:
    """TCP and UDP between the two hosts' pods, both ways: nothing is lost or rewritten, and the MTU is what subnet.env says."""
    for near, far in ((one, two), (two, one)):
        source, target = near.pod_address(family), far.pod_address(family)
        with tcp_echo(far.pod, target):
            assert await asyncio.to_thread(tcp_call, near.pod, target) == str(source)
        fits = [await asyncio.to_thread(udp_fits, near.pod, far.pod, source, target, near.mtu + more) for more in (0, 1)]
        assert fits == [True, False], f"packets of {near.mtu} bytes and of one more: {fits}"


def subnets_of(host: OverlayHost) -> tuple[IPNetwork, ...]:
    env = host.subnet_env
    texts = [env[name] for name in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET") if name in env]
    return tuple(ipaddress.ip_interface(text).network for text in texts)
