"""The laws of the keyed diff, held against the fake kernel: what is applied is there, nothing is done twice, in small steps or
in one the same comes out, and what is not ours stays."""

import asyncio
import ipaddress
from dataclasses import dataclass, replace

import plannodes
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.model.addr import Family
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, FdbEntry, Link, Neighbour, NetState, Route, Vxlan
from podwire.model.ops import (
    AddAddress,
    AddLink,
    ChangeLink,
    DelAddress,
    DelFdb,
    DelLink,
    DelRoute,
    Op,
    SetFdb,
    SetNeighbour,
    SetRoute,
)
from podwire.plan.diff import diff, diff_host, restrict
from podwire.plan.naming import host_veth
from podwire.plan.node import Unit, plan_base, plan_node, union_units
from podwire.plan.overlay import plan_peer
from podwire.plan.podlinks import fresh_pod_namespace, plan_pod
from podwire.testing import FakeKernel


@dataclass(frozen=True)
class Wish:
    """A node's content, small enough for hypothesis to shrink."""

    families: tuple[Family, ...]
    peers: frozenset[int]
    pods: frozenset[int]
    service_route: bool

    def units(self) -> dict[str, Unit]:
        net = replace(plannodes.network(1, self.families), service_route=self.service_route)
        units: dict[str, Unit] = {"base": {HOST: plan_base(net)}}
        for index in self.peers:
            for peer in plannodes.peers(index, self.families):
                units[f"peer/{index}/{peer.family}"] = {HOST: plan_peer(peer)}
        units |= {f"pod/{number}": plan_pod(plannodes.pod(net, number)) for number in self.pods}
        return units

    def state(self) -> Unit:
        net = replace(plannodes.network(1, self.families), service_route=self.service_route)
        peers = [peer for index in self.peers for peer in plannodes.peers(index, self.families)]
        return plan_node(net, peers, [plannodes.pod(net, number) for number in self.pods])


def wishes() -> st.SearchStrategy[Wish]:
    return st.builds(
        Wish,
        st.sampled_from([(Family.IPV4,), (Family.IPV6,), (Family.IPV4, Family.IPV6)]),
        st.frozensets(st.integers(2, 5)),
        st.frozensets(st.integers(1, 4)),
        st.booleans(),
    )


async def bring(kernel: FakeKernel, desired: Unit) -> tuple[Op, ...]:
    """One round of observe, diff, apply over all namespaces, as an agent with every pod attached."""
    for ns in desired:
        if ns != HOST:
            kernel.attach(ns, 0)
    observed = {ns: await kernel.observe(ns) for ns in kernel.namespaces}
    plan = diff(desired, observed)
    applied = await kernel.apply(plan)
    assert applied.ok, applied.failures
    return plan


async def all_of(kernel: FakeKernel) -> dict[NetnsName, NetState]:
    return {ns: await kernel.observe(ns) for ns in kernel.namespaces}


def assert_holds(desired: Unit, observed: dict[NetnsName, NetState]) -> None:
    """Everything wanted is there, and nothing else of ours."""
    for ns, wanted in desired.items():
        seen = observed[ns]
        ours = {name for name, link in seen.links.items() if link.owned}
        assert ours == {name for name, link in wanted.links.items() if link.owned}
        for name, link in wanted.links.items():
            there = seen.links[name]
            assert (there.up, there.mtu) == (link.up, link.mtu or there.mtu)
            assert (there.mac, there.master) == (link.mac or there.mac, link.master or there.master)
        assert {a for a in seen.addresses if a.dev in ours and not a.interface.is_link_local} == wanted.addresses
        assert seen.routes == wanted.routes
        assert seen.neighbours == wanted.neighbours
        assert seen.fdb == wanted.fdb
        assert wanted.sysctls.items() <= seen.sysctls.items()


@given(wishes(), wishes())
@settings(max_examples=60, deadline=None)
def test_what_is_applied_is_there_and_is_not_applied_again(first: Wish, second: Wish) -> None:
    async def scenario() -> None:
        kernel = plannodes.fresh_kernel()
        for wish in (first, second):
            await bring(kernel, wish.state())
            assert_holds(wish.state(), await all_of(kernel))
            assert await bring(kernel, wish.state()) == ()

    asyncio.run(scenario())


@given(wishes(), wishes())
@settings(max_examples=60, deadline=None)
def test_unit_by_unit_comes_to_the_same_as_from_scratch(first: Wish, second: Wish) -> None:
    second = replace(second, families=first.families)

    async def scenario() -> None:
        small, whole = plannodes.fresh_kernel(), plannodes.fresh_kernel()
        await bring(small, first.state())
        old, new = first.units(), second.units()
        for name in sorted(old.keys() | new.keys()):
            before: Unit = old.get(name, {})
            after: Unit = new.get(name, {})
            fresh = {ns: fresh_pod_namespace() for ns in after if ns != HOST and ns not in before}
            for ns in fresh:
                small.attach(ns, 0)
            plan = diff(after, {**before, **fresh} if after else {HOST: before[HOST]})
            applied = await small.apply(plan)
            assert applied.ok, applied.failures
        await bring(whole, second.state())
        seen, expected = await all_of(small), await all_of(whole)
        for ns in second.state():
            assert without_made_up(seen[ns]) == without_made_up(expected[ns])

    asyncio.run(scenario())


def without_made_up(state: NetState) -> NetState:
    """Without what the kernel chooses: MACs nobody asked for. Switches stay set when nobody asks for them any more."""
    links = {name: replace(link, mac=None if name.startswith("veth") else link.mac) for name, link in state.links.items()}
    addresses = frozenset(a for a in state.addresses if not a.interface.is_link_local)
    return replace(state, links=links, addresses=addresses, sysctls={})


@given(wishes(), st.data())
@settings(max_examples=40, deadline=None)
def test_any_loss_is_put_back_by_just_what_was_lost(wish: Wish, data: st.DataObject) -> None:
    async def scenario() -> None:
        kernel = plannodes.fresh_kernel()
        desired = wish.state()
        await bring(kernel, desired)
        host = await kernel.observe()
        losses: list[Op] = [DelRoute(route) for route in host.routes]
        losses += [DelLink(name) for name, link in host.links.items() if link.owned and name != "cni0"]
        losses += [DelAddress(a) for a in host.addresses if host.links[a.dev].owned and not a.interface.is_link_local]
        loss = data.draw(st.sampled_from(sorted(losses, key=repr)))
        kernel.drift(loss)
        repair = await bring(kernel, desired)
        assert_holds(desired, await all_of(kernel))
        if isinstance(loss, DelRoute):
            assert repair == (SetRoute(loss.route),)

    asyncio.run(scenario())


def test_routes_come_last_and_go_first() -> None:
    net = plannodes.network()
    desired = plan_node(net, plannodes.peers(2), [plannodes.pod(net, 1)])
    up = diff(desired, {ns: fresh_pod_namespace() for ns in desired if ns != HOST})
    at = {type(op): index for index, op in reversed(list(enumerate(up))) if op.ns == HOST}
    assert at[AddLink] < at[AddAddress] < at[SetNeighbour] < at[SetRoute]
    down = diff({}, desired)
    assert [type(op) for op in down if isinstance(op, DelRoute | DelLink)][-1] is DelLink
    names = [op.link.name for op in up if isinstance(op, AddLink)]
    assert names.index("cni0") < names.index(host_veth("uid-1"))


def test_only_our_own_is_ever_removed() -> None:
    strangers = NetState(
        links={
            "eth0": plannodes.UPLINK,
            "docker0": Link("docker0", Bridge(), mtu=1500, mac="02:42:00:00:00:01", alias=""),
            "cni0": Link("cni0", Bridge(), alias="podwire"),
        },
        addresses=frozenset(
            Address(dev, ipaddress.ip_interface(text))
            for dev, text in [
                ("eth0", "198.18.0.11/15"),
                ("docker0", "172.17.0.1/16"),
                ("cni0", "10.9.9.1/24"),
                ("cni0", "fe80::1/64"),
            ]
        ),
    )
    gone = diff_host(NetState(links={"cni0": strangers.links["cni0"]}), strangers)
    assert gone == (DelAddress(Address("cni0", ipaddress.ip_interface("10.9.9.1/24"))),)
    assert diff_host(NetState(), strangers) == (DelLink("cni0"),)


def test_a_device_of_the_wrong_kind_is_made_anew_if_it_is_ours() -> None:
    net = plannodes.network(families=[Family.IPV4])
    desired = plan_node(net, plannodes.peers(2, [Family.IPV4]), [])

    async def scenario() -> None:
        kernel = plannodes.fresh_kernel()
        await bring(kernel, desired)
        kind = Vxlan(vni=1, port=4789, local=ipaddress.ip_address("198.18.0.11"), underlay="eth0")
        kernel.drift(DelLink("flannel.1"), AddLink(Link("flannel.1", kind, alias="podwire")))
        plan = await bring(kernel, desired)
        assert [type(op).__name__ for op in plan][:2] == ["DelLink", "AddLink"]
        assert_holds(desired, await all_of(kernel))

    asyncio.run(scenario())


def test_a_stranger_in_the_way_is_left_and_the_kernel_says_so() -> None:
    desired = plan_base(plannodes.network(families=[Family.IPV4]))

    async def scenario() -> None:
        kernel = plannodes.fresh_kernel()
        kind = Vxlan(vni=1, port=8472, local=ipaddress.ip_address("198.18.0.99"), underlay="eth0")
        kernel.drift(AddLink(Link("flannel.1", kind)))
        applied = await kernel.apply(diff_host(desired, await kernel.observe()))
        assert [type(failure.op) for failure in applied.failures] == [AddLink]
        assert (await kernel.observe()).links["flannel.1"].kind == kind

    asyncio.run(scenario())


def test_a_peer_with_a_new_mac_leaves_no_old_forwarding_entry() -> None:
    (before,) = plannodes.peers(2, [Family.IPV4])
    after = replace(before, mac="02:00:00:00:00:01")
    names = [type(op).__name__ for op in diff_host(plan_peer(after), plan_peer(before))]
    assert names == ["SetNeighbour", "SetFdb", "DelFdb"]


def test_a_changed_prefix_length_replaces_the_address() -> None:
    old = NetState({"cni0": Link("cni0", Bridge(), alias="podwire")}, frozenset([_address("fd00::1/64")]))
    new = replace(old, addresses=frozenset([_address("fd00::1/80")]))
    assert diff_host(new, old) == (DelAddress(_address("fd00::1/64")), AddAddress(_address("fd00::1/80")))


def test_restrict_keeps_what_has_the_units_keys() -> None:
    one = NetState(
        links={"a": Link("a", Bridge())},
        routes=frozenset([Route(ipaddress.ip_network("10.0.0.0/24"), dev="a")]),
        neighbours=frozenset([Neighbour("a", ipaddress.ip_address("10.0.0.1"), "02:00:00:00:00:01")]),
        fdb=frozenset([FdbEntry("a", "02:00:00:00:00:01", ipaddress.ip_address("10.9.0.1"))]),
    )
    both = union_units([{HOST: one}, {HOST: plan_base(plannodes.network())}])
    assert restrict(both[HOST], one) == one


def test_a_pair_that_lost_an_end_is_made_anew() -> None:
    net = plannodes.network()
    unit = plan_pod(plannodes.pod(net, 1))
    (pod_ns,) = (ns for ns in unit if ns != HOST)
    half = {HOST: unit[HOST], pod_ns: NetState(links={"lo": unit[pod_ns].links["lo"]})}
    plan = diff(unit, half)
    assert plan[0] == DelLink(host_veth("uid-1"))
    assert isinstance(plan[1], AddLink)
    assert plan[1].peer is not None
    assert ChangeLink not in {type(op) for op in plan}


def _address(text: str) -> Address:
    return Address("cni0", ipaddress.ip_interface(text))


def test_entries_on_a_strangers_device_are_left_alone() -> None:
    """An administrator's permanent neighbour on the uplink is none of ours to sweep."""
    state = plan_node(plannodes.network(1), plannodes.peers(2), [])[HOST]
    gateway = Neighbour("eth0", ipaddress.ip_address("198.18.1.1"), "02:00:00:00:00:01")
    theirs = FdbEntry("vxlan9", "02:00:00:00:00:02", ipaddress.ip_address("198.18.0.99"))
    links = {**state.links, "eth0": plannodes.UPLINK, "vxlan9": Link("vxlan9", Bridge())}
    observed = replace(state, links=links, neighbours=state.neighbours | {gateway}, fdb=state.fdb | {theirs})
    assert diff_host(state, observed) == ()


def test_a_peers_new_mac_leaves_no_old_entry() -> None:
    old = plannodes.peers(2, (Family.IPV4,))[0]
    new = replace(old, mac="02:00:00:00:00:09")
    base = plan_base(plannodes.network(1, (Family.IPV4,)))
    plans = [
        diff_host(plan_peer(new), plan_peer(old)),  # from what was applied before
        diff_host(
            union_units([{HOST: base}, {HOST: plan_peer(new)}])[HOST], union_units([{HOST: base}, {HOST: plan_peer(old)}])[HOST]
        ),
    ]
    entry = FdbEntry("flannel.1", old.mac, old.public_ip)
    for plan in plans:
        assert plan == (
            SetNeighbour(Neighbour("flannel.1", old.subnet.network_address, new.mac)),
            SetFdb(replace(entry, mac=new.mac)),
            DelFdb(entry),
        )
