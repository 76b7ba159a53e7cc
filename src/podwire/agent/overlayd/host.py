"""What an overlay agent needs of its host beside the kernel port: the host's own routes, other programs, a UDP tunnel."""

import asyncio
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Protocol

from podwire.agent.overlayd.udpproxy import UdpProxy
from podwire.kernel.commands import Outcome, run_command
from podwire.kernel.features import Feature, probe_features
from podwire.kernel.netns import run_in_netns
from podwire.kernel.routes import default_device, source_towards
from podwire.model.addr import Family, IPAddress


class Tunnel(Protocol):
    """Carries packets until closed."""

    def set_route(self, subnet: IPv4Network, address: IPv4Address | None) -> None: ...

    async def close(self) -> None: ...


_NEEDS = {
    "vxlan": Feature.VXLAN,
    "ipip": Feature.IPIP,
    "wireguard": Feature.WIREGUARD,
    "udp": Feature.TUN,
}


def require_backend(backend: str) -> None:
    """Raise Unsupported, with advice, where this kernel lacks what the back end of that type needs. Blocks a little."""
    if backend in _NEEDS:
        probe_features().require(_NEEDS[backend])


class Host(Protocol):
    def require(self, backend: str) -> None:
        """Raise Unsupported, with advice, where the kernel lacks what the back end of that type needs. May block a little."""
        ...

    def default_device(self, family: Family) -> str: ...

    def source_towards(self, destination: IPAddress) -> IPAddress | None: ...

    def read_switch(self, key: str) -> str:
        """The value of a sysctl (`net/ipv4/ip_forward`); empty where there is none."""
        ...

    async def run_command(self, argv: Sequence[str], stdin: str) -> Outcome: ...

    def open_tunnel(self, device: str, local: IPv4Address, port: int, ended: Callable[[], None]) -> Tunnel:
        """`ended` is called, on the loop, when the tunnel stops by itself. Raises OSError or Unsupported."""
        ...


class LinuxHost:
    """The host whose network namespace is behind the descriptor (the caller's to close)."""

    def __init__(self, netns_fd: int) -> None:
        self._netns_fd = netns_fd

    def require(self, backend: str) -> None:
        require_backend(backend)

    def default_device(self, family: Family) -> str:
        return default_device(self._netns_fd, family)

    def source_towards(self, destination: IPAddress) -> IPAddress | None:
        return source_towards(self._netns_fd, destination)

    def read_switch(self, key: str) -> str:
        def read() -> str:
            try:
                return Path("/proc/sys", key).read_text(encoding="ascii").strip()
            except OSError:
                return ""

        return run_in_netns(self._netns_fd, read)

    async def run_command(self, argv: Sequence[str], stdin: str) -> Outcome:
        return await run_command(self._netns_fd, argv, stdin)

    def open_tunnel(self, device: str, local: IPv4Address, port: int, ended: Callable[[], None]) -> Tunnel:
        loop = asyncio.get_running_loop()
        return UdpProxy(self._netns_fd, device, local, port, lambda: loop.call_soon_threadsafe(ended))
