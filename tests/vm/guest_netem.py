"""A delayed cable, run inside the virtual machine by test_netem_vm.py."""

import ipaddress
import socket
import time
from collections.abc import Callable

import pytest

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.lab.injector import set_delay
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Link, Veth
from podwire.model.ops import AddAddress, AddLink

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(200)]

SLOW_MS = 300
THERE = NetnsName("there")


def round_trip(client: int, server: int) -> float:
    """Milliseconds that a datagram takes there and back."""
    there = run_in_netns(server, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    here = run_in_netns(client, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with there, here:
        for sock in (there, here):
            sock.settimeout(10)
        there.bind(("198.18.0.2", 7))
        started = time.monotonic()
        here.sendto(b"hello", ("198.18.0.2", 7))
        there.sendto(b"hello", there.recvfrom(100)[1])
        here.recvfrom(100)
        return (time.monotonic() - started) * 1000


async def test_a_delayed_cable_is_slower_each_way_until_it_is_healed(
    linux_kernel: LinuxKernel, netns: int, make_netns: Callable[[], int]
) -> None:
    other = make_netns()
    linux_kernel.attach(THERE, other)
    addresses = [ipaddress.ip_interface(f"198.18.0.{number}/24") for number in (1, 2)]
    plan = (
        AddLink(Link("u0", Veth("u0", THERE)), peer=Link("u0", Veth("u0", HOST))),
        AddAddress(Address("u0", addresses[0])),
        AddAddress(Address("u0", addresses[1]), THERE),
    )
    applied = await linux_kernel.apply(plan)
    assert applied.ok, applied.failures
    round_trip(netns, other)  # both learn the other's MAC
    assert round_trip(netns, other) < SLOW_MS
    set_delay(netns, "u0", SLOW_MS)
    assert SLOW_MS <= round_trip(netns, other) < 2 * SLOW_MS
    set_delay(other, "u0", SLOW_MS)
    assert round_trip(netns, other) >= 2 * SLOW_MS
    for end in (netns, other):
        set_delay(end, "u0", 0)
    assert round_trip(netns, other) < SLOW_MS
