"""An overlay agent on a kernel in memory, with an etcd in memory, and what a test wants to see of them."""

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from random import Random
from typing import Any

from overlayrun import run_until_left

from podwire.agent.overlayd.agent import OverlayAgent, OverlayOptions
from podwire.agent.overlayd.files import read_last_subnets
from podwire.agent.overlayd.host import Tunnel
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.kernel.commands import Outcome
from podwire.model.addr import Family, IPAddress
from podwire.model.kernelstate import Address, Device, Link
from podwire.model.ops import AddAddress
from podwire.testing.fakeetcd import FakeEtcd, FakeEtcdClient
from podwire.testing.fakekernel import FakeKernel

PREFIX = "/coreos.com/network"


class MemoryTunnel:
    def __init__(self) -> None:
        self.routes: dict[IPv4Network, IPv4Address] = {}
        self.closed = False

    def set_route(self, subnet: IPv4Network, address: IPv4Address | None) -> None:
        if address is None:
            self.routes.pop(subnet, None)
        else:
            self.routes[subnet] = address

    async def close(self) -> None:
        self.closed = True


class MemoryHost:
    """A host with a default route through `eth0`."""

    def __init__(self) -> None:
        self.tunnels: list[MemoryTunnel] = []
        self.ended: Callable[[], None] = lambda: None
        self.refuse = 0

    def require(self, backend: str) -> None:
        """It has everything."""

    def default_device(self, family: Family) -> str:
        return "eth0"

    def source_towards(self, destination: IPAddress) -> IPAddress | None:
        return ipaddress.ip_address("192.0.2.1") if destination.version == 4 else None

    def read_switch(self, key: str) -> str:
        return "1"

    async def run_command(self, argv: Sequence[str], stdin: str) -> Outcome:
        return Outcome(0, "", "")

    def open_tunnel(self, device: str, local: IPv4Address, port: int, ended: Callable[[], None]) -> Tunnel:
        if self.refuse:
            self.refuse -= 1
            raise OSError("the port is taken")
        self.ended = ended
        self.tunnels.append(MemoryTunnel())
        return self.tunnels[-1]


class Site:
    def __init__(self, folder: Path) -> None:
        self.etcd = FakeEtcd()
        self.client = FakeEtcdClient(self.etcd)
        self.kernel = FakeKernel(uplink=Link("eth0", Device()))
        self.host = MemoryHost()
        self.folder = folder

    @asynccontextmanager
    async def agent(self, backend: dict[str, Any], *, dual: bool = False, **options: Any) -> AsyncIterator[OverlayAgent]:
        document: dict[str, Any] = {"Network": "10.5.0.0/16", "Backend": backend}
        addresses = ["192.0.2.1/24", *(["2001:db8::1/64"] if dual else [])]
        if dual:
            document |= {"EnableIPv6": True, "IPv6Network": "fd05::/48"}
        ops = tuple(AddAddress(Address("eth0", ipaddress.ip_interface(text))) for text in addresses)
        assert (await self.kernel.apply(ops)).ok
        await self.client.put(f"{PREFIX}/config", json.dumps(document).encode())
        settings: dict[str, Any] = {
            "node": "n1",
            "subnet_file": self.folder / "subnet.env",
            "wireguard_key": self.folder / "wgkey",
            "forward_rules": False,
        }
        subnets = EtcdSubnets(self.client, last=read_last_subnets(settings["subnet_file"]), rng=Random(3))
        agent = OverlayAgent(OverlayOptions(**(settings | options)), self.kernel, subnets, self.host, Random(3))
        async with run_until_left(agent):
            yield agent

    async def lease(self, subnet: str, **value: Any) -> None:
        key = f"{PREFIX}/subnets/{subnet.replace('/', '-')}"
        await self.client.put(key, json.dumps({"PublicIP": "192.0.2.2", "PublicIPv6": None} | value).encode())

    @property
    def own_key(self) -> str:
        subnet = ipaddress.ip_interface(self.env["FLANNEL_SUBNET"]).network
        return f"{PREFIX}/subnets/{str(subnet).replace('/', '-')}"

    @property
    def env(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in (self.folder / "subnet.env").read_text().splitlines())

    @property
    def ways(self) -> set[tuple[str, str]]:
        return {(str(route.dst), route.dev) for route in self.kernel.host.state().routes}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)
