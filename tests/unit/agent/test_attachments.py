"""CNI's verbs on a kernel in memory: what engines do right, and what they do wrong."""

import asyncio
import errno
import ipaddress
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cnirig import CniNode, config, environment, give_network, make_node, node_network

from podwire.agent.attachrecord import AttachmentRecord
from podwire.agent.reservations import Owner
from podwire.model.cni import (
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    IO_FAILURE,
    KERNEL_REFUSED,
    NO_ADDRESS,
    NOT_AVAILABLE,
    NOT_AVAILABLE_LIMITED,
    TRY_LATER,
    UNKNOWN_CONTAINER,
    AttachmentKey,
    CniError,
    CniRequest,
    CniResult,
)
from podwire.model.ids import pod_netns
from podwire.model.kernelstate import Device, Link
from podwire.plan.naming import BRIDGE, host_veth
from podwire.testing.fakekernel import FakeKernel
from podwire.wire.cni import parse_request

NETWORK = node_network()
SMALL = node_network([ipaddress.ip_network("10.244.1.0/29")])
WEB = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}


class Engine:
    """Calls the verbs as an engine does. Namespaces are files: what is in them, the fake kernel has."""

    def __init__(self, node: CniNode, kernel: FakeKernel, directory: Path) -> None:
        self.node, self.kernel, self.directory = node, kernel, directory

    def netns(self, name: str) -> str:
        path = self.directory / "netns" / name
        path.touch()
        return str(path)

    def end(self, container: str, ifname: str = "eth0") -> None:
        """The container's namespace goes, with all in it."""
        file = self.directory / "netns" / container
        if file.exists():
            file.rename(file.with_suffix(".gone"))  # its inode must not come again
        label = pod_netns(AttachmentKey(container, ifname).uid)
        if label in self.kernel.namespaces:
            self.kernel.destroy(label)

    def request(self, verb: str, container: str = "", ifname: str = "eth0", **more: Any) -> CniRequest:
        args = more.pop("args", "")
        netns = self.netns(container) if container and verb in ("ADD", "CHECK") else ""
        variables = environment(Path("/none"), verb, container, netns, ifname)
        return parse_request(variables | ({"CNI_ARGS": args} if args else {}), _json(config(**more)))

    async def add(self, container: str, ifname: str = "eth0", **more: Any) -> CniResult:
        return await self.node.attachments.add(self.request("ADD", container, ifname, **more), None)

    async def delete(self, container: str, ifname: str = "eth0") -> None:
        await self.node.attachments.delete(AttachmentKey(container, ifname))

    async def check(self, container: str, ifname: str = "eth0", **more: Any) -> None:
        await self.node.attachments.check(self.request("CHECK", container, ifname, **more), None)

    def veths(self) -> set[str]:
        return {name for name in self.kernel.host.links if name.startswith("veth")}

    @property
    def held(self) -> set[str]:
        return {str(r.address) for r in self.node.reservations.all()}


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


MakeEngine = Callable[..., Any]


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel(Link("eth0", Device(), mtu=1500))


@pytest_asyncio.fixture
async def make_engine(tmp_path: Path, kernel: FakeKernel) -> AsyncIterator[MakeEngine]:
    """Makes the node's agent; again: the earlier one is as good as killed."""
    made: list[CniNode] = []

    async def make(network: Any = NETWORK, **settings: Any) -> Engine:
        for node in made:
            node.reservations.close()
        (tmp_path / "netns").mkdir(exist_ok=True)
        made.append(await make_node(tmp_path, kernel, network, nsfs=tmp_path, **settings))
        return Engine(made[-1], kernel, tmp_path)

    yield make
    for node in made:
        node.reservations.close()


@pytest_asyncio.fixture
async def engine(make_engine: MakeEngine) -> Engine:
    made: Engine = await make_engine()
    return made


# --- ADD and DEL --------------------------------------------------------------------------------------------------


async def test_a_container_gets_addresses_a_link_and_a_result(engine: Engine, kernel: FakeKernel) -> None:
    result = await engine.add("c1")
    assert [str(ip.address) for ip in result.ips] == ["10.244.1.2/24", "fd00:10:244:1::2/64"]
    assert [str(ip.gateway) for ip in result.ips] == ["10.244.1.1", "fd00:10:244:1::1"]
    bridge, outside, inside = result.interfaces
    assert (bridge.name, inside.name, inside.sandbox) == (BRIDGE, "eth0", engine.netns("c1"))
    assert [str(route.dst) for route in result.routes] == ["0.0.0.0/0", "::/0"]
    pod = kernel.space(pod_netns("cni:c1/eth0"))
    assert pod.links["eth0"].mac == inside.mac
    assert kernel.host.links[outside.name].mac == outside.mac
    assert {str(a.interface) for a in pod.addresses if a.dev == "eth0"} >= {"10.244.1.2/24", "fd00:10:244:1::2/64"}
    assert pod.links["lo"].up


async def test_all_goes_with_del_and_a_second_one_is_done(engine: Engine) -> None:
    await engine.add("c1", runtimeConfig=WEB)
    await engine.delete("c1")
    await engine.delete("c1")
    await engine.delete("never-was")
    assert not engine.held
    assert not engine.veths()
    assert engine.node.host_ports == {"cni:c1/eth0": None}
    assert not engine.node.reservations.records


async def test_del_when_the_namespace_is_gone(engine: Engine) -> None:
    await engine.add("c1")
    engine.end("c1")
    await engine.delete("c1")
    assert not engine.held


async def test_add_again_gives_the_same_and_mends(engine: Engine, kernel: FakeKernel) -> None:
    first = await engine.add("c1")
    before = len(kernel.applied)
    assert await engine.add("c1") == first
    assert len(kernel.applied) == before, "nothing was wrong"
    pod = kernel.space(pod_netns("cni:c1/eth0"))
    pod.routes.clear()
    assert await engine.add("c1") == first
    assert len(pod.routes) == 2


async def test_add_in_another_namespace_means_that_a_del_was_dropped(engine: Engine, kernel: FakeKernel) -> None:
    first = await engine.add("c1")
    engine.end("c1")
    second = await engine.add("c1")
    assert [ip.address for ip in second.ips] != [ip.address for ip in first.ips], "an address comes again late"
    assert len(engine.held) == 2
    assert engine.veths() == {host_veth("cni:c1/eth0")}


async def test_a_namespace_under_another_name_means_that_a_del_was_dropped(engine: Engine, kernel: FakeKernel) -> None:
    await engine.add("c1")
    kernel.destroy(pod_netns("cni:c1/eth0"))
    (engine.directory / "netns" / "c1").rename(engine.directory / "netns" / "c2")
    result = await engine.add("c2")
    assert len(result.routes) == 2
    assert {record.container for record in engine.node.attachments.records} == {"c2"}
    assert engine.veths() == {host_veth("cni:c2/eth0")}


async def test_other_settings_replace_the_link(engine: Engine, kernel: FakeKernel) -> None:
    await engine.add("c1")
    result = await engine.add("c1", runtimeConfig={"mac": "02:00:00:00:00:07", "ips": ["10.244.1.77/24"]})
    assert str(result.ips[0].address) == "10.244.1.77/24"
    assert kernel.space(pod_netns("cni:c1/eth0")).links["eth0"].mac == "02:00:00:00:00:07"
    assert len(engine.held) == 2


async def test_a_second_interface_leaves_the_first_ones_default_routes(engine: Engine, kernel: FakeKernel) -> None:
    await engine.add("c1")
    second = await engine.add(
        "c1", "net1", ipam={"routes": [{"dst": "10.0.0.0/8"}, {"dst": "10.9.0.0/16", "gw": "10.244.1.9"}]}
    )
    assert [(str(r.dst), str(r.gateway)) for r in second.routes] == [
        ("10.0.0.0/8", "10.244.1.1"),
        ("10.9.0.0/16", "10.244.1.9"),
    ]
    assert {str(r.dst) for r in kernel.space(pod_netns("cni:c1/net1")).routes.values()} == {"10.0.0.0/8", "10.9.0.0/16"}
    await engine.delete("c1", "net1")
    assert engine.veths() == {host_veth("cni:c1/eth0")}


async def test_parallel_adds_get_addresses_of_their_own(engine: Engine) -> None:
    results = await asyncio.gather(*(engine.add(f"c{number}") for number in range(30)))
    assert len({ip.address for result in results for ip in result.ips}) == 60
    await asyncio.gather(*(engine.delete(f"c{number}") for number in range(30)))
    assert not engine.held
    assert not engine.veths()


async def test_what_the_kernel_refuses_leaves_nothing(engine: Engine, kernel: FakeKernel) -> None:
    kernel.fail_next("AddLink", errno.ENOMEM, message="Cannot allocate memory", times=2)
    with pytest.raises(CniError, match="Cannot allocate memory") as caught:
        await engine.add("c1")
    assert caught.value.code == KERNEL_REFUSED
    assert not engine.held
    assert not engine.veths()
    await engine.add("c1")


async def test_a_full_disk_is_told_on_add_and_outlived_on_del(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    await engine.add("c1")
    book = engine.node.reservations
    with monkeypatch.context() as disk:

        def full(statements: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        disk.setattr(book, "_transact", full)
        with pytest.raises(CniError, match="disk is full") as caught:
            await engine.add("c2")
        assert caught.value.code == IO_FAILURE
        await engine.delete("c1")
        assert not engine.veths()
        assert engine.held, "still reserved: the record on disk says so"
    await engine.node.attachments.sweep()
    assert not engine.held


async def test_the_next_agent_knows_of_a_del_that_the_disk_did_not_take(make_engine: MakeEngine, tmp_path: Path) -> None:
    first = await make_engine()
    await first.add("c1")

    def full(statements: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    first.node.reservations._transact = full
    await first.delete("c1")
    await first.node.attachments.work_off()
    assert first.held
    second = await make_engine()
    assert not second.held
    assert not second.veths()
    assert not list((tmp_path / "cni.sock.spool").iterdir())


# --- addresses and ports ------------------------------------------------------------------------------------------


async def test_a_full_range_names_the_holders(make_engine: MakeEngine) -> None:
    engine = await make_engine(SMALL)
    for number in range(5):
        await engine.add(f"c{number}", args=f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-{number}")
    with pytest.raises(CniError, match=r"10\.244\.1\.0/29.*shop/web-0") as caught:
        await engine.add("c9")
    assert caught.value.code == NO_ADDRESS
    with pytest.raises(CniError) as status:
        engine.node.attachments.status()
    assert status.value.code == NOT_AVAILABLE
    engine.end("c3")  # and its DEL is dropped
    assert str((await engine.add("c9")).ips[0].address) == "10.244.1.5/29"


@pytest.mark.parametrize("asked", [{"runtimeConfig": {"ips": ["10.244.1.50"]}}, {"args": "IP=10.244.1.50"}])
async def test_an_address_that_is_asked_for(engine: Engine, asked: dict[str, Any]) -> None:
    assert str((await engine.add("c1", **asked)).ips[0].address) == "10.244.1.50/24"
    with pytest.raises(CniError, match="held by podwire/c1") as caught:
        await engine.add("c2", **asked)
    assert caught.value.code == NO_ADDRESS


async def test_host_ports_are_those_of_a_pod(engine: Engine) -> None:
    await engine.add("c1", runtimeConfig=WEB)
    pod = engine.node.host_ports["cni:c1/eth0"]
    assert pod is not None
    assert [(p.host_port, p.container_port, p.protocol) for p in pod.spec.containers[0].ports] == [(8080, 80, "TCP")]
    assert pod.ips == ("10.244.1.2", "fd00:10:244:1::2")
    with pytest.raises(CniError, match="8080/TCP is in use by container c1") as caught:
        await engine.add("c2", runtimeConfig=WEB)
    assert caught.value.code == INVALID_CONFIG
    engine.end("c1")
    await engine.add("c2", runtimeConfig=WEB)


async def test_no_rule_leads_to_an_address_that_is_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    await engine.add("c1", runtimeConfig=WEB)
    await engine.add("c2")
    attachments = engine.node.attachments

    async def never() -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as rules:
        rules.setattr("podwire.agent.attachments.CLOSING_SECONDS", 0.05)
        rules.setattr(attachments, "_env", replace(attachments._env, host_ports_programmed=never))
        await engine.delete("c1")
        await engine.delete("c2")
        assert not engine.veths()
        assert len(engine.held) == 2, "those of c1, to whose port the host's rules may still lead"
    await attachments.sweep()
    assert not engine.held


async def test_chained_only_the_ports_are_ours(engine: Engine) -> None:
    previous = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
        "ips": [{"address": "10.88.0.9/16", "interface": 1}],
    }
    await engine.add("c1", prevResult=previous, runtimeConfig=WEB)
    assert not engine.held
    assert not engine.veths()
    pod = engine.node.host_ports["cni:c1/eth0"]
    assert pod is not None
    assert pod.ips == ("10.88.0.9",)
    await engine.check("c1", prevResult=previous, runtimeConfig=WEB)
    await engine.delete("c1")
    assert engine.node.host_ports["cni:c1/eth0"] is None


# --- CHECK, GC, STATUS --------------------------------------------------------------------------------------------


async def test_check_says_what_is_wrong(engine: Engine, kernel: FakeKernel) -> None:
    with pytest.raises(CniError, match="has no interface eth0") as unknown:
        await engine.check("c1")
    assert unknown.value.code == UNKNOWN_CONTAINER
    await engine.add("c1")
    await engine.check("c1")
    kernel.space(pod_netns("cni:c1/eth0")).routes.clear()
    with pytest.raises(CniError, match=r"route 0\.0\.0\.0/0") as wrong:
        await engine.check("c1")
    assert wrong.value.code == KERNEL_REFUSED
    engine.end("c1")
    with pytest.raises(CniError, match="another namespace"):
        await engine.check("c1")


async def test_gc_leaves_what_is_valid_and_other_networks(engine: Engine) -> None:
    for name in ("c1", "c2", "c3"):
        await engine.add(name)
    await engine.add("c4", name="other")
    await engine.node.attachments.collect("podwire", frozenset({AttachmentKey("c2", "eth0")}))
    assert {record.container for record in engine.node.attachments.records} == {"c2", "c4"}
    assert len(engine.held) == 4


async def test_nothing_is_attached_before_the_node_has_its_subnet(make_engine: MakeEngine) -> None:
    engine = await make_engine(None)
    with pytest.raises(CniError) as later:
        await engine.add("c1")
    assert later.value.code == TRY_LATER
    with pytest.raises(CniError) as status:
        engine.node.attachments.status()
    assert status.value.code == NOT_AVAILABLE
    await give_network(engine.node, NETWORK)
    engine.node.attachments.status()
    engine.node.health.failed("links", "the bridge is gone")
    with pytest.raises(CniError) as limited:
        engine.node.attachments.status()
    assert limited.value.code == NOT_AVAILABLE_LIMITED


async def test_what_is_no_namespace_is_refused(engine: Engine, tmp_path: Path) -> None:
    for path, why in ((str(tmp_path / "none"), "cannot be opened"), ("/proc/self/status", "not a network namespace")):
        request = parse_request(environment(Path("/none"), "ADD", "c1", path), _json(config()))
        with pytest.raises(CniError, match=why) as caught:
            await engine.node.attachments.add(request, None)
        assert caught.value.code == INVALID_ENVIRONMENT


# --- agents that come and go --------------------------------------------------------------------------------------


async def test_the_next_agent_knows_all(make_engine: MakeEngine, kernel: FakeKernel) -> None:
    first = await make_engine()
    result = await first.add("c1", runtimeConfig=WEB)
    before = len(kernel.applied)
    second = await make_engine()
    assert len(kernel.applied) == before, "adopted as it is"
    assert second.node.host_ports["cni:c1/eth0"].ips == ("10.244.1.2", "fd00:10:244:1::2")
    assert await second.add("c1", runtimeConfig=WEB) == result
    await second.delete("c1")
    assert not second.held
    assert not second.veths()


async def test_containers_that_ended_while_no_agent_ran_are_freed(make_engine: MakeEngine) -> None:
    first = await make_engine()
    await first.add("c1")
    await first.add("c2")
    first.end("c1")
    second = await make_engine()
    assert {record.container for record in second.node.attachments.records} == {"c2"}
    assert len(second.held) == 2


async def test_nothing_of_another_boot_goes_on(make_engine: MakeEngine) -> None:
    await (await make_engine()).add("c1", runtimeConfig=WEB)
    second = await make_engine(boot="boot-2")
    assert not second.held
    assert not second.veths()
    assert not second.node.host_ports.get("cni:c1/eth0")


async def test_a_path_out_of_sight_is_no_sign_of_death(make_engine: MakeEngine, tmp_path: Path) -> None:
    """The engine has a mount namespace of its own: the descriptor came with the request, the path leads nowhere."""
    first = await make_engine()
    request = parse_request(environment(Path("/none"), "ADD", "c1", "/run/netns/unseen"), _json(config()))
    netns = os.open(first.netns("unseen"), os.O_RDONLY)
    await first.node.attachments.add(request, netns)
    os.close(netns)
    assert await first.node.attachments.sweep() == 0
    second = await make_engine()
    assert second.node.plumbing.pods == {"cni:c1/eth0"}
    assert await second.node.attachments.sweep() == 0
    second.end("c1")
    assert await second.node.attachments.sweep() == 1
    assert not second.held


async def test_spooled_dels_are_done_at_the_next_start_unless_overtaken(make_engine: MakeEngine, tmp_path: Path) -> None:
    first = await make_engine()
    for name in ("c1", "c2", "c3"):
        await first.add(name)
    spool = tmp_path / "cni.sock.spool"
    spool.mkdir()
    for name in ("c1@eth0", "c9@eth0", ".c2@eth0.77"):
        (spool / name).touch()
    second = await make_engine()
    assert {record.container for record in second.node.attachments.records} == {"c2", "c3"}
    assert not list(spool.iterdir())
    (spool / "c3@eth0").touch()
    await second.add("c3")
    await second.node.attachments.work_off()
    assert {record.container for record in second.node.attachments.records} == {"c2", "c3"}


async def test_a_pods_addresses_are_none_of_the_engines(engine: Engine) -> None:
    book = engine.node.reservations
    await book.reserve(Owner("pod-uid", "shop", "web"), NETWORK.pod_cidrs, engine.node.attachments._env.clock())
    await engine.node.attachments.sweep()
    await engine.node.attachments.collect("podwire", frozenset())
    assert len(engine.held) == 2


async def test_listeners_hear_of_all(engine: Engine) -> None:
    heard: list[tuple[str, bool]] = []

    def listen(record: AttachmentRecord, ips: Any) -> None:
        heard.append((record.container, ips is not None))

    await engine.add("c1")
    engine.node.attachments.subscribe(listen)
    await engine.add("c2")
    await engine.delete("c1")
    assert heard == [("c1", True), ("c2", True), ("c1", False)]
