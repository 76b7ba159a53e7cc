"""LinuxKernel beyond the contract: real traffic over what it makes, notices that are lost, cancelled calls, clean ends."""

import asyncio
import gc
import ipaddress
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from podwire.kernel.events import EventStream
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import in_netns, netns_inode, run_in_netns
from podwire.kernel.port import KernelError, KernelEvent
from podwire.model.addr import Family
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, FdbEntry, Link, Neighbour, Route, Veth, Vxlan
from podwire.model.ops import AddAddress, AddLink, DelLink, Op, SetFdb, SetNeighbour, SetRoute

pytestmark = pytest.mark.kernel

PEER = NetnsName("peer")
FAMILIES = pytest.mark.parametrize("family", Family)


async def ok(kernel: LinuxKernel, *ops: Op) -> None:
    applied = await kernel.apply(ops)
    assert applied.ok, applied.failures


def interface(family: Family, number: int) -> Address:
    text = f"10.1.0.{number}/24" if family is Family.IPV4 else f"fd00:a::{number}/64"
    return Address("u0", ipaddress.ip_interface(text))


async def reached(source: int, target: int, address: str, port: int = 7) -> bytes:
    """What a UDP server in `target` received from a client in `source`."""
    af = socket.AF_INET6 if ":" in address else socket.AF_INET

    def bound() -> socket.socket:
        sock = socket.socket(af, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind(("::" if af == socket.AF_INET6 else "0.0.0.0", port))
        return sock

    with await in_netns(target, bound) as server:
        client = await in_netns(source, lambda: socket.socket(af, socket.SOCK_DGRAM))
        with client:
            client.sendto(b"hello", (address, port))
        async with asyncio.timeout(5):
            return await asyncio.get_running_loop().sock_recv(server, 100)


@FAMILIES
async def test_packets_over_a_veth_pair(
    linux_kernel: LinuxKernel, netns: int, make_netns: Callable[[], int], family: Family
) -> None:
    peer = make_netns()
    linux_kernel.attach(PEER, peer)
    here, there = interface(family, 1), interface(family, 2)
    await ok(
        linux_kernel,
        AddLink(Link("u0", Veth("u0", PEER)), peer=Link("u0", Veth("u0", HOST))),
        AddAddress(here),
        AddAddress(there, PEER),
    )
    assert await reached(netns, peer, str(there.interface.ip)) == b"hello"


@FAMILIES
@pytest.mark.needs("VXLAN devices")
async def test_packets_over_vxlan_with_static_entries(
    linux_kernel: LinuxKernel, netns: int, make_netns: Callable[[], int], family: Family
) -> None:
    """flannel's shape: neighbour, forwarding entry and onlink route, and nothing that asks around."""
    peer = make_netns()
    linux_kernel.attach(PEER, peer)
    ends = {HOST: interface(family, 1), PEER: interface(family, 2)}
    subnets = {HOST: ipaddress.ip_network("10.244.1.0/24"), PEER: ipaddress.ip_network("10.244.2.0/24")}
    macs = {HOST: "0a:58:0a:f4:01:00", PEER: "0a:58:0a:f4:02:00"}
    await ok(linux_kernel, AddLink(Link("u0", Veth("u0", PEER)), peer=Link("u0", Veth("u0", HOST))))
    for ns, other in ((HOST, PEER), (PEER, HOST)):
        own, far = subnets[ns].network_address, subnets[other].network_address
        await ok(
            linux_kernel,
            AddAddress(ends[ns], ns),
            AddLink(Link("flannel.1", Vxlan(1, 8472, ends[ns].interface.ip, "u0"), mac=macs[ns]), ns=ns),
            AddAddress(Address("flannel.1", ipaddress.ip_interface(f"{own}/32")), ns),
            SetNeighbour(Neighbour("flannel.1", far, macs[other]), ns),
            SetFdb(FdbEntry("flannel.1", macs[other], ends[other].interface.ip), ns),
            SetRoute(Route(subnets[other], "flannel.1", far, onlink=True), ns),
        )
    assert await reached(netns, peer, "10.244.2.0") == b"hello"


async def test_a_link_of_another_owner_is_a_device_or_what_it_is(linux_kernel: LinuxKernel, netns: int) -> None:
    """A kind that podwire does not make is a Device; its alias stays as it was."""
    await ok(linux_kernel, AddLink(Link("br0", Bridge(), alias="theirs")))
    link = (await linux_kernel.observe()).links["br0"]
    assert (link.kind, link.alias, link.owned) == (Bridge(), "theirs", False)


@pytest.mark.skipif(shutil.which("ip") is None, reason="the ip program is not installed")
async def test_lost_notices_are_told(linux_kernel: LinuxKernel, netns: int) -> None:
    stream = linux_kernel.events()
    await ok(linux_kernel, AddLink(Link("br0", Bridge())))
    # More than a stream's receive buffer holds, without a turn of the loop to read it: as when the loop is held up.
    text = "".join(f"route add 10.{n >> 8}.{n & 255}.0/24 dev br0 proto 112\n" for n in range(8000))
    run_in_netns(netns, lambda: subprocess.run(["ip", "-batch", "-"], input=text.encode(), check=True))
    async with asyncio.timeout(10):
        assert "lost" in [event.what async for event in _until_lost(stream)]
    await stream.aclose()


async def _until_lost(stream: EventStream) -> AsyncIterator[KernelEvent]:
    async for event in stream:
        yield event
        if event.what == "lost":
            return


async def test_nothing_stays_open(make_netns: Callable[[], int]) -> None:
    fd, pod = make_netns(), make_netns()
    await asyncio.to_thread(int)  # the loop's own threads, which `close` waits in, are there before the count
    before = len(os.listdir("/proc/self/fd"))
    kernel = LinuxKernel(fd)
    kernel.attach(PEER, pod)
    kernel.attach(PEER, pod)
    kernel.events()
    await ok(kernel, AddLink(Link("a", Veth("b", PEER))))
    await kernel.observe(PEER)
    await kernel.observe_nft("podwire")
    await kernel.close()
    await kernel.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(KernelError):
        await kernel.observe()
    with pytest.raises(KernelError):
        await kernel.apply((DelLink("a"),))


async def test_a_pod_costs_one_descriptor(linux_kernel: LinuxKernel, make_netns: Callable[[], int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pods = [NetnsName(f"pod/{n}") for n in range(20)]
    for ns in pods:
        linux_kernel.attach(ns, make_netns())
        await ok(linux_kernel, AddLink(Link("br0", Bridge()), ns=ns))
        await linux_kernel.observe(ns)
        await linux_kernel.observe_nft("podwire", ns)
    assert len(os.listdir("/proc/self/fd")) == before + 2 * len(pods), "one is the fixture's"


async def test_a_cancelled_apply_still_runs_to_its_end(linux_kernel: LinuxKernel) -> None:
    plan = (AddLink(Link("br0", Bridge())), *(AddLink(Link(f"v{n}", Veth(f"w{n}"))) for n in range(20)))
    stream = linux_kernel.events()
    task = asyncio.create_task(linux_kernel.apply(plan))
    await anext(stream)  # it has begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await linux_kernel.observe()).links) == 42  # observe waits for its turn
    await stream.aclose()


async def test_detach_during_a_request_closes_after_it(make_netns: Callable[[], int]) -> None:
    kernel = LinuxKernel(make_netns())
    pod = make_netns()
    kernel.attach(PEER, pod)
    task = asyncio.create_task(kernel.apply(tuple(AddLink(Link(f"b{n}", Bridge()), ns=PEER) for n in range(20))))
    await asyncio.sleep(0)
    kernel.detach(PEER)
    assert (await task).ok
    await kernel.close()
    gc.collect()
    assert run_in_netns(pod, lambda: len(socket.if_nameindex())) == 21


async def test_names_found_again_after_a_device_was_replaced(linux_kernel: LinuxKernel) -> None:
    """Indices are looked up for each plan: one that died with its device is never used for a new one."""
    bridge, address = Link("br0", Bridge()), Address("br0", ipaddress.ip_interface("10.1.0.1/24"))
    await ok(linux_kernel, AddLink(bridge), AddAddress(address), DelLink("br0"), AddLink(bridge), AddAddress(address))
    await ok(linux_kernel, DelLink("br0"), AddLink(replace(bridge, mtu=1400)))
    assert address not in (await linux_kernel.observe()).addresses


async def test_observed_peer_of_a_pod_is_not_ours_to_name(linux_kernel: LinuxKernel, make_netns: Callable[[], int]) -> None:
    pod = make_netns()
    linux_kernel.attach(PEER, pod)
    assert netns_inode(pod)
    await ok(linux_kernel, AddLink(Link("veth1", Veth("eth0", PEER))))
    assert (await linux_kernel.observe()).links["veth1"].kind == Veth()
