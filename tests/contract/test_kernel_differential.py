"""FakeKernel against Linux: whatever comes, both refuse the same operations with the same errno and end in the same state."""

import asyncio
import ipaddress
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns
from podwire.kernel.port import Kernel
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, FdbEntry, Link, Neighbour, NetState, NextHop, Route, Veth, Vxlan
from podwire.model.ops import (
    AddAddress,
    AddLink,
    ChangeLink,
    DelAddress,
    DelFdb,
    DelLink,
    DelNeighbour,
    DelRoute,
    Op,
    Plan,
    SetFdb,
    SetNeighbour,
    SetRoute,
    SetSysctl,
)
from podwire.testing import FakeKernel

pytestmark = pytest.mark.kernel

POD = NetnsName("pod/a")

bridges = st.sampled_from(["br0", "br1"])
names = st.sampled_from(["br0", "br1", "va", "vx"])
macs = st.sampled_from(["0a:58:00:00:00:01", "0a:58:00:00:00:02"])
mtus = st.sampled_from([1400, 1500])
flags = st.booleans()
aliases = st.sampled_from(["", "podwire", "podwire:x"])
masters = st.sampled_from([None, "", "br0", "br1"])
interfaces = st.sampled_from(["10.1.0.1/24", "10.2.0.1/24", "fd00:1::1/64", "fd00:2::1/64"]).map(ipaddress.ip_interface)
gateways4 = st.sampled_from(["10.1.0.9", "10.2.0.9", "10.3.0.9"]).map(ipaddress.ip_address)
gateways6 = st.sampled_from(["fd00:1::9", "fd00:2::9", "fd00:3::9"]).map(ipaddress.ip_address)
networks4 = st.sampled_from(["10.9.0.0/16", "10.8.0.0/24", "0.0.0.0/0"]).map(ipaddress.ip_network)
networks6 = st.sampled_from(["fd00:9::/48", "fd00:8::/64", "::/0"]).map(ipaddress.ip_network)
metrics = st.sampled_from([0, 50])

legs = st.lists(st.builds(NextHop, gateways4, bridges), min_size=2, max_size=2, unique=True).map(tuple)
links = st.one_of(
    st.builds(Link, bridges, st.just(Bridge()), mtus, macs, flags, alias=aliases),
    st.builds(
        Link,
        st.just("vx"),
        st.builds(Vxlan, st.integers(1, 2), st.just(8472), gateways4, st.sampled_from(["br0", "br1"])),
        st.just(1300),
        macs,
        flags,
        alias=aliases,
    ),
)
host_ends = st.builds(Link, st.just("va"), st.just(Veth("vb", POD)), mtus, macs, flags, masters, st.none() | flags, aliases)
pod_ends = st.builds(Link, st.just("vb"), st.just(Veth("va", HOST)), mtus, macs, flags, alias=aliases)
routes = st.one_of(
    st.builds(Route, networks4 | networks6, names, metric=metrics),
    st.builds(Route, networks4, names, gateways4, onlink=flags, metric=metrics),
    st.builds(Route, networks6, names, gateways6, onlink=flags, metric=metrics),
    st.builds(Route, networks4, nexthops=legs),
)
neighbours = st.builds(Neighbour, names, gateways4 | gateways6, macs)
entries = st.builds(FdbEntry, st.just("vx"), macs, gateways4)
keys = st.sampled_from(
    ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter", "kernel/hostname"]
)
ports = st.builds(Link, st.just("va"), st.just(Veth()), st.none() | mtus, st.none() | macs, flags, masters, flags, aliases)
others = st.builds(Link, names, st.just(Bridge()), st.none() | mtus, st.none() | macs, flags, alias=aliases)

operations = st.one_of(
    st.builds(AddLink, links),
    st.builds(AddLink, host_ends, pod_ends),
    st.builds(ChangeLink, ports | others),
    st.builds(DelLink, names),
    st.builds(AddAddress, st.builds(Address, names, interfaces)),
    st.builds(DelAddress, st.builds(Address, names, interfaces)),
    st.builds(SetRoute, routes),
    st.builds(DelRoute, routes),
    st.builds(SetNeighbour, neighbours),
    st.builds(DelNeighbour, neighbours),
    st.builds(SetFdb, entries),
    st.builds(DelFdb, entries),
    st.builds(SetSysctl, keys, st.sampled_from(["0", "1"])),
)
START = (
    AddLink(Link("br0", Bridge(), 1500, "0a:58:00:00:00:01", alias="podwire")),
    AddAddress(Address("br0", ipaddress.ip_interface("10.1.0.1/24"))),
    AddAddress(Address("br0", ipaddress.ip_interface("fd00:1::1/64"))),
)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
@given(st.lists(operations, min_size=5, max_size=30))
def test_fake_and_linux_agree(plan: list[Op]) -> None:
    asyncio.run(_compare((*START, *plan)))


async def _compare(plan: Plan) -> None:
    fds = create_netns(), create_netns()
    linux, fake = LinuxKernel(fds[0]), FakeKernel()
    try:
        for kernel, fd in ((linux, fds[1]), (fake, 0)):
            kernel.attach(POD, fd)
        for count, op in enumerate(plan, 1):
            refusals = [[failure.errno for failure in (await kernel.apply((op,))).failures] for kernel in (linux, fake)]
            assert refusals[0] == refusals[1], f"operation {count}: {op}"
            seen = [await _seen(kernel) for kernel in (linux, fake)]
            assert seen[0] == seen[1], f"after operation {count}: {op}"
    finally:
        await linux.close()
        for fd in fds:
            os.close(fd)


async def _seen(kernel: Kernel) -> list[str]:
    """Both namespaces as lines, without the addresses that the kernel gives itself."""
    return [f"{ns or 'host'}: {line}" for ns in (HOST, POD) for line in sorted(_lines(await kernel.observe(ns)))]


def _lines(state: NetState) -> Iterator[str]:
    yield from map(str, state.links.values())
    yield from (str(address) for address in state.addresses if not address.interface.ip.is_link_local)
    for values in (state.routes, state.neighbours, state.fdb):
        yield from map(str, values)
    yield str(sorted(state.sysctls.items()))
