"""Questions to the routing tables of a namespace: where the default route leads, with which address something is reached."""

import errno
import ipaddress
import socket

from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family, IPAddress, family_of
from podwire.wire.procroutes import default_device_v4, default_device_v6

_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def default_device(netns_fd: int, family: Family) -> str:
    """The device of the default route with the lowest metric; empty where there is none. Blocks ~0.2 ms."""
    file, parse = ("route", default_device_v4) if family is Family.IPV4 else ("ipv6_route", default_device_v6)

    def read() -> str:
        try:
            with open(f"/proc/thread-self/net/{file}", encoding="ascii") as opened:
                return parse(opened.read())
        except FileNotFoundError:
            return ""

    return run_in_netns(netns_fd, read)


def source_towards(netns_fd: int, destination: IPAddress) -> IPAddress | None:
    """The address that the kernel would send from; None where there is no route. Nothing is sent."""

    def ask() -> IPAddress | None:
        af = socket.AF_INET if family_of(destination) is Family.IPV4 else socket.AF_INET6
        try:
            with socket.socket(af, socket.SOCK_DGRAM) as sock:
                sock.connect((str(destination), 9))
                return ipaddress.ip_address(sock.getsockname()[0])
        except OSError as error:
            if error.errno in _UNREACHABLE:
                return None
            raise

    return run_in_netns(netns_fd, ask)
