"""Captures on real devices: what leaves one namespace is seen there going out and in the other coming in, in that order."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import pytest

from podwire.kernel.capture import Capture
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import in_netns
from podwire.lab.hops import hops_from
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Link, Veth
from podwire.model.ops import AddAddress, AddLink
from podwire.wire.packet import UDP

pytestmark = pytest.mark.kernel

OTHER = NetnsName("other")
PORT = 9000
NONCE = b"a-nonce-that-nothing-else-holds"


async def join(linux_kernel: LinuxKernel, other: int, here: str, there: str) -> None:
    """A veth pair between the kernel's namespace and `other`, with an address at each end."""
    linux_kernel.attach(OTHER, other)
    near, far = Link("left", Veth("right", OTHER)), Link("right", Veth("left", HOST))
    addresses = (Address("left", ipaddress.ip_interface(here)), Address("right", ipaddress.ip_interface(there)))
    plan = (AddLink(near, far), AddAddress(addresses[0]), AddAddress(addresses[1], ns=OTHER))
    assert (await linux_kernel.apply(plan)).ok


@pytest.mark.parametrize(("here", "there"), [("192.0.2.1/24", "192.0.2.2/24"), ("2001:db8::1/64", "2001:db8::2/64")])
async def test_a_packet_is_seen_at_both_ends(
    linux_kernel: LinuxKernel, netns: int, make_netns: Callable[[], int], here: str, there: str
) -> None:
    other = make_netns()
    await join(linux_kernel, other, here, there)
    address = str(ipaddress.ip_interface(there).ip)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def socket_here() -> socket.socket:
        return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    with await in_netns(other, socket_here) as server, await in_netns(netns, socket_here) as client:
        server.bind((address, PORT))
        async with Capture() as capture:
            await capture.open({"near": netns, "far": other})
            capture.expect(NONCE)
            client.sendto(b"noise", (address, PORT))
            client.sendto(NONCE, (address, PORT))
            async with asyncio.timeout(5):
                while await asyncio.get_running_loop().sock_recv(server, 100) != NONCE:
                    pass
            hops = hops_from(capture.collect())
    assert [(hop.place, hop.device, hop.outgoing) for hop in hops] == [("near", "left", True), ("far", "right", False)]
    assert {(str(hop.packet.dst), hop.packet.dport, hop.packet.protocol) for hop in hops} == {(address, PORT, UDP)}
    assert not any(hop.rewritten for hop in hops)


async def test_packets_are_in_order_from_the_first_on(
    linux_kernel: LinuxKernel, netns: int, make_netns: Callable[[], int]
) -> None:
    """Also where nobody has asked the kernel for time stamps before: it begins to give them a moment later."""
    other = make_netns()
    await join(linux_kernel, other, "192.0.2.1/24", "192.0.2.2/24")

    def socket_here() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with await in_netns(other, socket_here) as server, await in_netns(netns, socket_here) as client:
        server.bind(("192.0.2.2", PORT))
        for _ in range(20):
            async with Capture() as capture:
                await capture.open({"near": netns, "far": other})
                capture.expect(NONCE)
                client.sendto(NONCE, ("192.0.2.2", PORT))
                server.sendto(*server.recvfrom(100))
                client.recv(100)
                frames = [(frame.place, frame.outgoing) for frame in capture.collect()]
            assert frames == [("near", True), ("far", False), ("far", True), ("near", False)]
            await asyncio.sleep(0.02)  # until the kernel has switched its stamps off again


async def test_a_capture_leaves_no_socket(netns: int) -> None:
    capture = Capture()
    await capture.open({"here": netns})
    capture.close()
    assert capture.collect() == []
