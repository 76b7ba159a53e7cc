"""One suite over FakeKernel and LinuxKernel: what an operation does, and what is refused with which errno."""

import asyncio
import errno
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
import pytest_asyncio

from podwire.kernel.linux import LinuxKernel
from podwire.kernel.port import Kernel, KernelError, KernelEvent
from podwire.model.addr import Family, IPAddress, IPInterface, IPNetwork
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import (
    Address,
    Bridge,
    Device,
    FdbEntry,
    Link,
    Neighbour,
    NetState,
    NextHop,
    Route,
    Veth,
    Vxlan,
)
from podwire.model.nft import AddChain, AddElements, AddTable, Batch, Chain, DelElements, DelTable, FieldType, NftSet, TableRef
from podwire.model.nft import AddSet as AddNftSet
from podwire.model.ops import (
    AddAddress,
    AddLink,
    ChangeLink,
    CommitNft,
    DelAddress,
    DelFdb,
    DelLink,
    DelNeighbour,
    DelRoute,
    Op,
    SetFdb,
    SetNeighbour,
    SetRoute,
    SetSysctl,
)
from podwire.testing.fakekernel import FakeKernel

POD = NetnsName("pod/a")
OTHER = NetnsName("pod/b")
BRIDGE = Link("br0", Bridge(), mtu=1450, mac="0a:58:0a:f4:01:01", alias="podwire")
POD_END = Link("eth0", Veth("veth1", HOST), mtu=1450, mac="0a:58:0a:f4:01:02", alias="podwire")
HOST_END = Link("veth1", Veth("eth0", POD), mtu=1450, master="br0", hairpin=True, alias="podwire:shop/web")


@pytest_asyncio.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.kernel)])
async def kernel(request: pytest.FixtureRequest) -> AsyncIterator[Kernel]:
    """A kernel with the pod namespaces POD and OTHER attached."""
    if request.param == "fake":
        made: Kernel = FakeKernel()
        fds = [0, 0]
    else:
        make_netns: Callable[[], int] = request.getfixturevalue("make_netns")
        made = LinuxKernel(request.getfixturevalue("netns"))
        fds = [make_netns(), make_netns()]
    for ns, fd in zip((POD, OTHER), fds, strict=True):
        made.attach(ns, fd)
    try:
        yield made
    finally:
        await made.close()


Stranger = Callable[[Op], Awaitable[None]]


@pytest.fixture
def stranger(request: pytest.FixtureRequest, kernel: Kernel) -> Stranger:
    """Does an operation in the node's own namespace as someone else would."""

    async def act(op: Op) -> None:
        if isinstance(kernel, FakeKernel):
            kernel.drift(op)
            return
        other = LinuxKernel(request.getfixturevalue("netns"))
        await ok(other, op)
        await other.close()

    return act


async def ok(kernel: Kernel, *ops: Op) -> None:
    applied = await kernel.apply(ops)
    assert applied.failures == ()
    assert applied.done == len(ops)


async def refused(kernel: Kernel, op: Op) -> int:
    """The errno with which a lone operation fails; the message says something."""
    applied = await kernel.apply((op,))
    assert applied.done == 0
    (failure,) = applied.failures
    assert failure.op is op
    assert failure.message
    return failure.errno


def ours(state: NetState) -> frozenset[Address]:
    """The addresses without those that the kernel gives itself."""
    return frozenset(a for a in state.addresses if not a.interface.ip.is_link_local and a.dev != "lo")


def ip(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


def net(text: str) -> IPNetwork:
    return ipaddress.ip_network(text)


def iface(text: str) -> IPInterface:
    return ipaddress.ip_interface(text)


FAMILIES = pytest.mark.parametrize(
    ("address", "gateway", "dst", "neighbour"),
    [
        pytest.param("10.244.1.1/24", "10.244.1.9", "10.9.0.0/16", "10.244.1.77", id="ipv4"),
        pytest.param("fd00:1::1/64", "fd00:1::9", "fd00:9::/48", "fd00:1::77", id="ipv6"),
    ],
)


async def test_new_namespace_has_lo_only(kernel: Kernel) -> None:
    state = await kernel.observe()
    assert set(state.links) == {"lo"}
    lo = state.links["lo"]
    assert (lo.kind, lo.up, lo.mtu, lo.master, lo.hairpin) == (Device(), False, 65536, "", False)
    assert not state.routes
    assert not state.neighbours
    assert not state.fdb


async def test_bridge_is_observed_as_made(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE))
    assert (await kernel.observe()).links["br0"] == replace(BRIDGE, master="", hairpin=False)


async def test_link_left_down_stays_down(kernel: Kernel) -> None:
    await ok(kernel, AddLink(replace(BRIDGE, up=False)))
    assert not (await kernel.observe()).links["br0"].up


async def test_veth_into_a_pod(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE), AddLink(HOST_END, peer=POD_END))
    host, pod = (await kernel.observe()).links, (await kernel.observe(POD)).links
    assert host["veth1"] == replace(HOST_END, kind=Veth(), mac=host["veth1"].mac)
    assert pod["eth0"] == replace(POD_END, kind=Veth(), master="", hairpin=False)
    assert host["veth1"].owned
    assert set((await kernel.observe(OTHER)).links) == {"lo"}


async def test_a_link_that_is_up_carries_soon(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE), AddLink(HOST_END, peer=POD_END))
    async with asyncio.timeout(5):
        while not await kernel.carries("veth1"):  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0)
    assert not await kernel.carries("nothing")


async def test_veth_made_from_the_pod_side(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE), AddLink(POD_END, peer=HOST_END, ns=POD))
    assert (await kernel.observe()).links["veth1"].master == "br0"
    assert "eth0" in (await kernel.observe(POD)).links


async def test_veth_between_two_pods(kernel: Kernel) -> None:
    left, right = Link("left", Veth("right", OTHER)), Link("right", Veth("left", POD), mtu=1400)
    await ok(kernel, AddLink(left, peer=right, ns=POD))
    assert (await kernel.observe(OTHER)).links["right"].mtu == 1400
    assert set((await kernel.observe()).links) == {"lo"}


async def test_veth_within_one_namespace_names_its_peer(kernel: Kernel) -> None:
    await ok(kernel, AddLink(Link("a", Veth("b")), peer=Link("b", Veth("a"))))
    links = (await kernel.observe()).links
    assert (links["a"].kind, links["b"].kind) == (Veth("b"), Veth("a"))


async def test_removing_one_end_removes_the_other(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE), AddLink(HOST_END, peer=POD_END), DelLink("veth1"))
    assert set((await kernel.observe(POD)).links) == {"lo"}


@pytest.mark.parametrize("local", ["10.0.0.1", "fd00::1"])
async def test_vxlan_is_observed_as_made(kernel: Kernel, local: str) -> None:
    vxlan = Link("flannel.1", Vxlan(1, 8472, ip(local), "br0"), mtu=1370, mac="0a:58:0a:f4:01:00", alias="podwire")
    await ok(kernel, AddLink(BRIDGE), AddLink(vxlan))
    assert (await kernel.observe()).links["flannel.1"] == replace(vxlan, master="", hairpin=False)


@pytest.mark.parametrize(("local", "largest"), [("10.0.0.1", 1400), ("fd00::1", 1380)])
async def test_vxlan_leaves_room_for_the_outer_headers(kernel: Kernel, local: str, largest: int) -> None:
    vxlan = Link("vx", Vxlan(1, 8472, ip(local), "br0"), mtu=1450)
    await ok(kernel, AddLink(BRIDGE), AddLink(vxlan), AddLink(Link("vx2", Vxlan(2, 8472, ip(local), "br0"))))
    links = (await kernel.observe()).links
    assert (links["vx"].mtu, links["vx2"].mtu) == (largest, largest)
    assert await refused(kernel, ChangeLink(replace(vxlan, mtu=largest + 1))) == errno.EINVAL


async def test_vxlan_goes_with_its_underlay(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE), AddLink(Link("vx", Vxlan(7, 8472, ip("10.0.0.1"), "br0"))), DelLink("br0"))
    assert set((await kernel.observe()).links) == {"lo"}


async def test_add_link_leaves_an_existing_one_alone(kernel: Kernel) -> None:
    await ok(kernel, AddLink(replace(BRIDGE, alias="theirs", up=False)))
    before = (await kernel.observe()).links
    assert await refused(kernel, AddLink(BRIDGE)) == errno.EEXIST
    assert (await kernel.observe()).links == before


async def test_add_link_needs_its_master(kernel: Kernel) -> None:
    assert await refused(kernel, AddLink(HOST_END, peer=POD_END)) == errno.ENODEV
    assert set((await kernel.observe()).links) == set((await kernel.observe(POD)).links) == {"lo"}


async def test_add_link_needs_its_underlay(kernel: Kernel) -> None:
    assert await refused(kernel, AddLink(Link("vx", Vxlan(7, 8472, ip("10.0.0.1"), "eth9")))) == errno.ENODEV


async def test_a_device_is_never_made(kernel: Kernel) -> None:
    assert await refused(kernel, AddLink(Link("eth0", Device()))) == errno.EINVAL


async def test_a_name_too_long(kernel: Kernel) -> None:
    assert await refused(kernel, AddLink(Link("sixteen-letters-", Bridge()))) == errno.ERANGE


async def test_a_failed_add_link_leaves_nothing(kernel: Kernel) -> None:
    not_a_bridge = Link("vx", Vxlan(7, 8472, ip("10.0.0.1"), "br0"))
    await ok(kernel, AddLink(BRIDGE), AddLink(not_a_bridge))
    assert await refused(kernel, AddLink(replace(HOST_END, master="vx"), peer=POD_END)) == errno.EOPNOTSUPP
    assert set((await kernel.observe()).links) == {"lo", "br0", "vx"}
    assert set((await kernel.observe(POD)).links) == {"lo"}


@pytest.mark.parametrize(("mtu", "after"), [(None, 1300), (1500, 1500), (1450, 1450)])
async def test_a_bridge_keeps_the_mtu_that_it_was_given(kernel: Kernel, mtu: int | None, after: int) -> None:
    await ok(kernel, AddLink(replace(BRIDGE, mtu=mtu)), AddLink(replace(HOST_END, mtu=1300), peer=POD_END))
    assert (await kernel.observe()).links["br0"].mtu == after


async def test_the_last_ipv4_address_takes_routes_and_neighbours_along(kernel: Kernel) -> None:
    address = Address("br0", iface("10.244.1.1/24"))
    kept = Route(net("fd00:9::/48"), "br0")
    entry = Neighbour("br0", ip("10.244.1.7"), "0a:58:0a:f4:02:00")
    await ok(kernel, AddLink(BRIDGE), AddAddress(address), SetRoute(Route(net("10.9.0.0/16"), "br0")), SetRoute(kept))
    await ok(kernel, SetNeighbour(entry), DelAddress(address))
    state = await kernel.observe()
    assert state.routes == {kept}
    assert not state.neighbours


async def test_change_link(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE), AddLink(HOST_END, peer=POD_END))
    want = replace(HOST_END, mtu=1300, mac="0a:58:00:00:00:09", alias="podwire:other", hairpin=False, up=False)
    await ok(kernel, ChangeLink(want))
    assert (await kernel.observe()).links["veth1"] == replace(want, kind=Veth())
    await ok(kernel, ChangeLink(replace(want, master="")))
    assert (await kernel.observe()).links["veth1"].master == ""


async def test_change_link_keeps_what_is_none(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE), AddLink(HOST_END, peer=POD_END))
    before = (await kernel.observe()).links["veth1"]
    await ok(kernel, ChangeLink(Link("veth1", Veth(), alias=HOST_END.alias)))
    assert (await kernel.observe()).links["veth1"] == before


async def test_change_link_of_what_is_not_there(kernel: Kernel) -> None:
    assert await refused(kernel, ChangeLink(Link("eth9", Device()))) == errno.ENODEV
    await ok(kernel, AddLink(BRIDGE))
    assert await refused(kernel, ChangeLink(replace(BRIDGE, master="br9"))) == errno.ENODEV


async def test_lo_up_has_its_addresses(kernel: Kernel) -> None:
    await ok(kernel, ChangeLink(Link("lo", Device(), up=True)))
    state = await kernel.observe()
    assert state.addresses == {Address("lo", iface("127.0.0.1/8")), Address("lo", iface("::1/128"))}


@FAMILIES
async def test_address(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    want = Address("br0", iface(address))
    await ok(kernel, AddLink(BRIDGE), AddAddress(want), AddAddress(want))
    assert ours(await kernel.observe()) == {want}
    await ok(kernel, DelAddress(want), DelAddress(want))
    assert ours(await kernel.observe()) == frozenset()


@FAMILIES
async def test_address_without_device(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    assert await refused(kernel, AddAddress(Address("eth9", iface(address)))) == errno.ENODEV
    await ok(kernel, DelAddress(Address("eth9", iface(address))))


@FAMILIES
async def test_routes(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    source = iface(address).ip
    direct = Route(net(dst), "br0", src=source)
    await ok(kernel, AddLink(BRIDGE), AddAddress(Address("br0", iface(address))), SetRoute(direct))
    assert (await kernel.observe()).routes == {direct}
    via = Route(net(dst), "br0", via=ip(gateway))
    await ok(kernel, SetRoute(via), SetRoute(via))
    assert (await kernel.observe()).routes == {via}, "the route with the same key is replaced"
    backup = replace(via, metric=2000)
    await ok(kernel, SetRoute(backup))
    assert (await kernel.observe()).routes == {via, backup}
    await ok(kernel, DelRoute(via), DelRoute(backup), DelRoute(backup))
    assert (await kernel.observe()).routes == frozenset()


@FAMILIES
async def test_blackholes(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    """Beside a route of the same network that is preferred: what is left when that goes with its device."""
    hole, way = Route(net(dst), metric=4000000000, blackhole=True), Route(net(dst), "br0", via=ip(gateway))
    await ok(kernel, SetRoute(hole), SetRoute(hole))
    await ok(kernel, AddLink(BRIDGE), AddAddress(Address("br0", iface(address))), SetRoute(way))
    assert (await kernel.observe()).routes == {hole, way}
    await ok(kernel, DelLink("br0"))
    assert (await kernel.observe()).routes == {hole}
    await ok(kernel, DelRoute(hole), DelRoute(hole))
    assert (await kernel.observe()).routes == frozenset()


@FAMILIES
async def test_default_route(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    default = Route(net("0.0.0.0/0" if iface(address).version == 4 else "::/0"), "br0", via=ip(gateway))
    await ok(kernel, AddLink(BRIDGE), AddAddress(Address("br0", iface(address))), SetRoute(default))
    assert (await kernel.observe()).routes == {default}


@FAMILIES
async def test_multipath_route(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    legs = (NextHop(ip(gateway), "br0"), NextHop(ip(neighbour), "br0"))
    route = Route(net(dst), nexthops=legs)
    await ok(kernel, AddLink(BRIDGE), AddAddress(Address("br0", iface(address))), SetRoute(route))
    assert (await kernel.observe()).routes == {route}
    single = Route(net(dst), "br0", via=ip(gateway))
    await ok(kernel, SetRoute(single))
    assert (await kernel.observe()).routes == {single}
    await ok(kernel, SetRoute(route))
    assert (await kernel.observe()).routes == {route}
    await ok(kernel, DelRoute(route))
    assert (await kernel.observe()).routes == frozenset()


@FAMILIES
async def test_onlink_route(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    far = net(dst).network_address
    onlink = Route(net(dst), "br0", via=far, onlink=True)
    code = errno.ENETUNREACH if far.version == 4 else errno.EHOSTUNREACH
    await ok(kernel, AddLink(BRIDGE), AddAddress(Address("br0", iface(address))))
    assert await refused(kernel, SetRoute(replace(onlink, onlink=False))) == code
    await ok(kernel, SetRoute(onlink))
    assert (await kernel.observe()).routes == {onlink}


@FAMILIES
async def test_refused_routes(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    assert await refused(kernel, SetRoute(Route(net(dst), "eth9"))) == errno.ENODEV
    await ok(kernel, AddLink(replace(BRIDGE, up=False)))
    assert await refused(kernel, SetRoute(Route(net(dst), "br0"))) == errno.ENETDOWN
    await ok(kernel, ChangeLink(BRIDGE))
    assert await refused(kernel, SetRoute(Route(net(dst), "br0", src=ip(gateway)))) == errno.EINVAL


@FAMILIES
async def test_routes_go_when_the_device_goes_down(
    kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str
) -> None:
    await ok(kernel, AddLink(BRIDGE), SetRoute(Route(net(dst), "br0")), ChangeLink(replace(BRIDGE, up=False)))
    assert (await kernel.observe()).routes == frozenset()


@FAMILIES
async def test_neighbours(kernel: Kernel, address: str, gateway: str, dst: str, neighbour: str) -> None:
    entry = Neighbour("br0", ip(neighbour), "0a:58:0a:f4:02:00")
    await ok(kernel, AddLink(BRIDGE), SetNeighbour(entry), SetNeighbour(entry))
    assert (await kernel.observe()).neighbours == {entry}
    moved = replace(entry, mac="0a:58:0a:f4:02:01")
    await ok(kernel, SetNeighbour(moved))
    assert (await kernel.observe()).neighbours == {moved}
    await ok(kernel, DelNeighbour(moved), DelNeighbour(moved))
    assert (await kernel.observe()).neighbours == frozenset()
    assert await refused(kernel, SetNeighbour(replace(entry, dev="eth9"))) == errno.ENODEV


async def test_permanent_neighbours_go_when_the_mac_changes(kernel: Kernel) -> None:
    entry = Neighbour("br0", ip("10.244.1.7"), "0a:58:0a:f4:02:00")
    await ok(kernel, AddLink(BRIDGE), SetNeighbour(entry), ChangeLink(replace(BRIDGE, mac="0a:58:00:00:00:02")))
    assert (await kernel.observe()).neighbours == frozenset()


async def test_neighbours_stay_when_the_mac_is_set_to_what_it_is(kernel: Kernel) -> None:
    entries = {Neighbour("br0", ip(text), "0a:58:0a:f4:02:00") for text in ("10.244.1.7", "fd00:1::7")}
    await ok(kernel, AddLink(BRIDGE), *map(SetNeighbour, entries), ChangeLink(replace(BRIDGE, alias="podwire:new")))
    assert (await kernel.observe()).neighbours == entries


@pytest.mark.parametrize(("local", "peers"), [("10.0.0.1", ("10.0.0.2", "10.0.0.3")), ("fd00::1", ("fd00::2", "fd00::3"))])
async def test_forwarding_entries(kernel: Kernel, local: str, peers: tuple[str, str]) -> None:
    vxlan = Link("flannel.1", Vxlan(1, 8472, ip(local), "br0"))
    entry = FdbEntry("flannel.1", "0a:58:0a:f4:02:00", ip(peers[0]))
    await ok(kernel, AddLink(BRIDGE), AddLink(vxlan), SetFdb(entry), SetFdb(entry))
    assert (await kernel.observe()).fdb == {entry}
    moved = replace(entry, dst=ip(peers[1]))
    await ok(kernel, SetFdb(moved))
    assert (await kernel.observe()).fdb == {moved}
    await ok(kernel, DelFdb(moved), DelFdb(moved))
    assert (await kernel.observe()).fdb == frozenset()


async def test_sysctls(kernel: Kernel) -> None:
    assert (await kernel.observe()).sysctls == {}
    await ok(kernel, SetSysctl("net/ipv4/ip_forward", "1"), SetSysctl("net/ipv6/conf/all/forwarding", "1"))
    await ok(kernel, SetSysctl("net/ipv4/ip_forward", "0", POD))
    assert (await kernel.observe()).sysctls == {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
    assert (await kernel.observe(POD)).sysctls == {"net/ipv4/ip_forward": "0"}


async def test_a_sysctl_is_read_whoever_set_it(kernel: Kernel) -> None:
    assert await kernel.read_sysctl("net/ipv4/no_such_switch") == ""
    await ok(kernel, SetSysctl("net/ipv4/conf/all/route_localnet", "2"))
    assert await kernel.read_sysctl("net/ipv4/conf/all/route_localnet") == "2"
    await ok(kernel, SetSysctl("net/ipv4/ip_forward", "1", POD))
    assert await kernel.read_sysctl("net/ipv4/ip_forward", POD) == "1"


async def test_refused_sysctls(kernel: Kernel) -> None:
    assert await refused(kernel, SetSysctl("net/ipv4/conf/eth9/forwarding", "1")) == errno.ENOENT
    assert await refused(kernel, SetSysctl("kernel/hostname", "x")) == errno.EINVAL
    assert await refused(kernel, SetSysctl("net/../kernel/hostname", "x")) == errno.EINVAL


async def test_independent_operations_go_on_after_a_failure(kernel: Kernel) -> None:
    bad: list[Op] = [SetRoute(Route(net("10.9.0.0/16"), "eth9")), SetRoute(Route(net("10.8.0.0/16"), "br0", via=ip("9.9.9.9")))]
    plan = (AddLink(BRIDGE), bad[0], AddAddress(Address("br0", iface("10.244.1.1/24"))), bad[1], AddLink(Link("br1", Bridge())))
    applied = await kernel.apply(plan)
    assert [failure.op for failure in applied.failures] == bad
    assert applied.done == 3
    assert not applied.ok
    assert {"br0", "br1"} <= set((await kernel.observe()).links)


async def test_flows_of_a_new_namespace(kernel: Kernel) -> None:
    assert await kernel.forget_flows(lambda _: True) == 0


async def test_unknown_namespaces(kernel: Kernel) -> None:
    kernel.detach(OTHER)
    kernel.detach(NetnsName("pod/never-seen"))
    with pytest.raises(KernelError):
        await kernel.observe(OTHER)
    assert await refused(kernel, AddLink(BRIDGE, ns=OTHER)) == errno.ENOENT
    assert await refused(kernel, AddLink(Link("a", Veth("b", OTHER)))) == errno.ENOENT


async def test_later_operations_see_earlier_ones(kernel: Kernel) -> None:
    """Also where a device went and came back within one plan, or its MAC changed twice."""
    address = Address("br0", iface("10.244.1.1/24"))
    other = replace(BRIDGE, mac="0a:58:00:00:00:07")
    await ok(
        kernel,
        AddLink(BRIDGE),
        AddAddress(address),
        DelLink("br0"),
        AddLink(BRIDGE),
        AddAddress(address),
        ChangeLink(other),
        ChangeLink(BRIDGE),
        ChangeLink(other),
    )
    state = await kernel.observe()
    assert address in state.addresses
    assert state.links["br0"].mac == other.mac


@pytest.mark.parametrize("family", Family)
async def test_a_thousand_routes_in_one_plan(kernel: Kernel, family: Family) -> None:
    base = "10.128.0.0/10" if family is Family.IPV4 else "fd00:4::/54"
    step = 24 if family is Family.IPV4 else 64
    gateway = ip("10.244.1.9") if family is Family.IPV4 else ip("fd00:1::9")
    address = Address("br0", iface("10.244.1.1/24" if family is Family.IPV4 else "fd00:1::1/64"))
    subnets = [net(str(subnet)) for subnet, _ in zip(net(base).subnets(new_prefix=step), range(1000), strict=False)]
    routes = [Route(subnet, "br0", via=gateway) for subnet in subnets]
    neighbours = [Neighbour("br0", subnet.network_address, "0a:58:00:00:00:01") for subnet in subnets]
    await ok(kernel, AddLink(BRIDGE), AddAddress(address), *map(SetRoute, routes), *map(SetNeighbour, neighbours))
    state = await kernel.observe()
    assert state.routes == set(routes)
    assert state.neighbours == set(neighbours)
    await ok(kernel, *map(DelRoute, routes[:500]))
    assert (await kernel.observe()).routes == set(routes[500:])


async def test_all_of_a_thousand_refused(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE))
    bad = tuple(SetRoute(Route(net(f"10.{i // 250}.{i % 250}.0/24"), "br0", via=ip("9.9.9.9"))) for i in range(1000))
    applied = await kernel.apply(bad)
    assert [failure.op for failure in applied.failures] == list(bad)


async def test_empty_plan(kernel: Kernel) -> None:
    assert (await kernel.apply(())).done == 0


async def collect(kernel: Kernel, until: KernelEvent, *ops: Op) -> list[KernelEvent]:
    """What is told while `ops` are applied, up to the event `until` (who did it aside)."""
    stream = kernel.events()
    try:
        await ok(kernel, *ops)
        seen: list[KernelEvent] = []
        async with asyncio.timeout(5):
            async for event in stream:
                seen.append(replace(event, ours=False))
                if seen[-1] == until:
                    break
        return seen
    finally:
        await stream.aclose()


async def test_events_tell_what_changed(kernel: Kernel) -> None:
    address = Address("br0", iface("10.244.1.1/24"))
    route = Route(net("10.9.0.0/16"), "br0", via=ip("10.244.1.9"))
    neighbour = Neighbour("br0", ip("10.244.1.77"), "0a:58:0a:f4:02:00")
    entry = FdbEntry("vx", "0a:58:0a:f4:02:00", ip("10.0.0.2"))
    told = [
        KernelEvent(HOST, "link", "br0", removed=False),
        KernelEvent(HOST, "address", "10.244.1.1/24 on br0", removed=False),
        KernelEvent(HOST, "route", "10.9.0.0/16 via 10.244.1.9 dev br0", removed=False),
        KernelEvent(HOST, "neighbour", "10.244.1.77 is 0a:58:0a:f4:02:00 on br0", removed=False),
        KernelEvent(HOST, "link", "vx", removed=False),
        KernelEvent(HOST, "fdb", "0a:58:0a:f4:02:00 → 10.0.0.2 on vx", removed=False),
    ]
    seen = await collect(
        kernel,
        told[-1],
        AddLink(BRIDGE),
        AddAddress(address),
        SetRoute(route),
        SetNeighbour(neighbour),
        AddLink(Link("vx", Vxlan(1, 8472, ip("10.0.0.1"), "br0"))),
        SetFdb(entry),
    )
    assert set(told) <= set(seen)
    seen = await collect(
        kernel, KernelEvent(HOST, "route", "10.9.0.0/16 via 10.244.1.9 dev br0", removed=True), DelRoute(route)
    )
    assert len(seen) == 1
    await collect(kernel, KernelEvent(HOST, "link", "br0", removed=True), DelLink("br0"))


async def test_own_routes_are_told_as_ours(kernel: Kernel) -> None:
    await ok(kernel, AddLink(BRIDGE))
    stream = kernel.events()
    await ok(kernel, SetRoute(Route(net("10.9.0.0/16"), "br0")))
    async with asyncio.timeout(5):
        event = await anext(event async for event in stream if event.what == "route")
    assert event.ours
    await stream.aclose()


async def test_strangers_routes_are_told_as_theirs(kernel: Kernel, stranger: Stranger) -> None:
    route = Route(net("10.9.0.0/16"), "br0")
    await ok(kernel, AddLink(BRIDGE), SetRoute(route))
    stream = kernel.events()
    await stranger(DelRoute(route))
    async with asyncio.timeout(5):
        event = await anext(event async for event in stream if event.what == "route")
    assert event == KernelEvent(HOST, "route", "10.9.0.0/16 dev br0", removed=True, ours=False)
    await stream.aclose()


async def test_a_closed_stream_ends(kernel: Kernel) -> None:
    stream = kernel.events()
    await stream.aclose()
    await stream.aclose()
    assert [event async for event in stream] == []


TABLE = TableRef(Family.IPV4, "podwire")
ADDRESSES = NftSet("addresses", (FieldType.IPV4,))
SETUP = Batch((AddTable(TABLE), AddChain(TABLE, Chain("c1")), AddNftSet(TABLE, ADDRESSES)))


async def test_nft_is_observed_as_committed(kernel: Kernel) -> None:
    assert (await kernel.observe_nft("podwire")).tables == {}
    element = (ip("10.0.0.1").packed, None)
    await ok(kernel, CommitNft(SETUP), CommitNft(Batch((AddElements(TABLE, ADDRESSES, (element,)),))))
    table = (await kernel.observe_nft("podwire")).tables[TABLE]
    assert set(table.chains) == {"c1"}
    assert table.sets["addresses"].elements == dict([element])
    assert (await kernel.observe_nft("podwire", POD)).tables == {}
    assert (await kernel.observe_nft("other")).tables == {}
    await ok(kernel, CommitNft(Batch((DelTable(TABLE),))))
    assert (await kernel.observe_nft("podwire")).tables == {}


async def test_a_table_of_nft_is_switched_off_and_on(kernel: Kernel) -> None:
    await ok(kernel, CommitNft(SETUP), CommitNft(Batch((AddTable(TABLE, dormant=True),))))
    off = (await kernel.observe_nft("podwire")).tables[TABLE]
    assert off.dormant
    assert set(off.chains) == {"c1"}
    await ok(kernel, CommitNft(SETUP))
    assert not (await kernel.observe_nft("podwire")).tables[TABLE].dormant


async def test_a_refused_nft_batch_changes_nothing(kernel: Kernel) -> None:
    await ok(kernel, CommitNft(SETUP))
    before = await kernel.observe_nft("podwire")
    absent = (ip("10.0.0.9").packed, None)
    bad = Batch((AddChain(TABLE, Chain("c2")), DelElements(TABLE, ADDRESSES, (absent,))))
    await refused(kernel, CommitNft(bad))
    assert await kernel.observe_nft("podwire") == before


async def test_own_nft_transactions_are_not_told(kernel: Kernel) -> None:
    stream = kernel.events()
    route = Route(net("10.9.0.0/16"), "br0")
    await ok(kernel, CommitNft(SETUP), AddLink(BRIDGE), SetRoute(route))
    seen: list[str] = []
    async with asyncio.timeout(5):
        async for event in stream:
            seen.append(event.what)
            if event.what == "route":
                break
    assert "nft" not in seen
    await stream.aclose()


async def test_nft_changes_by_others_are_told(kernel: Kernel, stranger: Stranger) -> None:
    await ok(kernel, CommitNft(SETUP))
    stream = kernel.events()
    await stranger(CommitNft(Batch((AddElements(TABLE, ADDRESSES, ((ip("10.0.0.1").packed, None),)),))))
    async with asyncio.timeout(5):
        event = await anext(stream)
    assert (event.what, event.subject, event.ours) == ("nft", "element in table podwire", False)
    await stream.aclose()
