"""The executed plugin, both of them, and the agent's socket, on the real kernel: what an engine sees, and packets."""

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cnirig import PLUGIN, CniNode, Outcome, config, environment, execute, make_node, node_network, serving

from podwire.cni.install import install_plugin
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns, run_in_netns
from podwire.model.cni import IO_FAILURE, NOT_AVAILABLE, TRY_LATER
from podwire.model.ids import NetnsName
from podwire.plan.naming import host_veth
from podwire.wire.cni import encode_answer

pytestmark = [pytest.mark.kernel, pytest.mark.needs("bridge devices", "IPv6")]

NETWORK = node_network()


@pytest.fixture(scope="session", params=["compiled", "python"])
def plugin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "python":
        return PLUGIN
    directory = tmp_path_factory.mktemp("bin")
    if install_plugin(directory, Path("/nonexistent")) != "compiled":
        pytest.skip("no C compiler")
    return directory / "podwire"


class Engine:
    """Container engine: makes namespaces, executes the plugin."""

    def __init__(self, directory: Path, kernel: LinuxKernel, plugin: Path) -> None:
        self.socket = directory / "cni.sock"
        self._directory, self._kernel, self._plugin = directory, kernel, plugin
        self.fds: dict[str, int] = {}

    def netns(self, container: str) -> str:
        if container not in self.fds:
            self.fds[container] = create_netns()
        return f"/proc/{os.getpid()}/fd/{self.fds[container]}"

    def end(self, container: str) -> None:
        os.close(self.fds.pop(container))

    async def call(self, verb: str, container: str = "", *, ifname: str = "eth0", **more: Any) -> Outcome:
        netns = self.netns(container) if container and verb != "DEL" else ""
        variables = environment(self.socket, verb, container, netns, ifname)
        return await execute(variables, config(**more), self._plugin)

    async def node(self, **settings: Any) -> CniNode:
        """An agent on this node; the one before it is as good as killed."""
        return await make_node(self._directory, self._kernel, NETWORK, tunnels=False, **settings)

    async def links(self) -> set[str]:
        return {name for name, link in (await self._kernel.observe()).links.items() if link.owned and name != "cni0"}

    async def inside(self, container: str) -> Any:
        label = NetnsName("look")
        self._kernel.attach(label, self.fds[container])
        try:
            return await self._kernel.observe(label)
        finally:
            self._kernel.detach(label)


@pytest_asyncio.fixture
async def engine(tmp_path: Path, linux_kernel: LinuxKernel, plugin: Path) -> AsyncIterator[Engine]:
    made = Engine(tmp_path, linux_kernel, plugin)
    yield made
    for fd in made.fds.values():
        os.close(fd)


def addresses(outcome: Outcome) -> list[str]:
    assert outcome.status == 0, outcome.document
    return [ip["address"].partition("/")[0] for ip in outcome.document["ips"]]


async def test_two_containers_talk_and_leave_nothing(engine: Engine) -> None:
    async with serving(await engine.node()) as node:
        one, two = await asyncio.gather(engine.call("ADD", "one"), engine.call("ADD", "two"))
        assert set(one.document) == {"cniVersion", "interfaces", "ips", "routes", "dns"}
        for address in addresses(two):
            assert await talk(engine, "one", "two", address) == b"hello"
        assert (await engine.call("CHECK", "one", prevResult=one.document)).status == 0
        for name in ("one", "two", "two"):
            done = await engine.call("DEL", name)
            assert (done.status, done.document) == (0, None)
        assert not await engine.links()
        assert not node.reservations.all()
        assert (await engine.inside("one")).links.keys() == {"lo"}


async def test_names_macs_addresses_as_asked(engine: Engine) -> None:
    async with serving(await engine.node()):
        asked = {"mac": "02:00:00:00:00:09", "ips": ["10.244.1.99/24"]}
        outcome = await engine.call("ADD", "one", ifname="podwire0", runtimeConfig=asked, mtu=1400)
        assert addresses(outcome)[0] == "10.244.1.99"
        again = await engine.call("ADD", "one", ifname="podwire0", runtimeConfig=asked, mtu=1400)
        assert again == outcome
        link = (await engine.inside("one")).links["podwire0"]
        assert (link.mac, link.mtu, link.up) == ("02:00:00:00:00:09", 1400, True)
        said = {entry["name"]: entry["mac"] for entry in outcome.document["interfaces"]}
        seen = await engine.inside("one")
        assert said["podwire0"] == seen.links["podwire0"].mac
        outside = (await engine._kernel.observe()).links
        assert {name: outside[name].mac for name in said if name in outside} == {
            name: mac for name, mac in said.items() if name != "podwire0"
        }
        second = await engine.call("ADD", "one", ifname="net1")
        assert addresses(second)
        assert "routes" not in second.document, "the first interface has the default routes"
        assert {r.dev for r in (await engine.inside("one")).routes} == {"podwire0"}


async def test_a_del_without_agent_is_done_when_the_next_one_starts(engine: Engine, tmp_path: Path) -> None:
    async with serving(await engine.node()):
        for name in ("one", "two", "three"):
            assert (await engine.call("ADD", name)).status == 0
    engine.end("two")
    for name in ("one", "two"):
        assert (await engine.call("DEL", name)).status == 0, "kept for the agent"
    assert host_veth("cni:one/eth0") in await engine.links()
    assert (await engine.call("ADD", "four")).code == TRY_LATER
    assert (await engine.call("STATUS")).code == NOT_AVAILABLE
    assert (await engine.call("VERSION")).document["supportedVersions"][-1] == "1.1.0"
    async with serving(await engine.node()) as node:
        assert {record.container for record in node.attachments.records} == {"three"}
        assert await engine.links() == {host_veth("cni:three/eth0")}
        assert not list((tmp_path / "cni.sock.spool").iterdir())
        assert (await engine.call("STATUS")).status == 0
        assert (await engine.call("ADD", "one")).status == 0, "the same container once more"


async def test_a_del_that_cannot_be_kept_is_not_said_to_be_done(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "cni.sock.spool").write_text("in the way")
    assert (await engine.call("DEL", "one")).code == IO_FAILURE


@pytest.mark.parametrize("missing", [["CNI_CONTAINERID"], ["CNI_IFNAME"], ["CNI_CONTAINERID", "CNI_IFNAME"]])
async def test_a_del_of_nothing_is_refused_and_not_kept(plugin: Path, tmp_path: Path, missing: list[str]) -> None:
    variables = environment(tmp_path / "cni.sock", "DEL", "one") | dict.fromkeys(missing, "")
    done = await execute(variables, config(), plugin)
    assert (done.code, done.document["msg"]) == (4, f"required env variables [{','.join(missing)}] are missing")
    assert not os.listdir(tmp_path), "nothing is spooled"


async def test_a_node_before_its_subnet_keeps_dels(engine: Engine, tmp_path: Path, linux_kernel: LinuxKernel) -> None:
    async with serving(await make_node(tmp_path, linux_kernel, None)):
        assert (await engine.call("DEL", "one")).status == 0
        assert [file.name for file in (tmp_path / "cni.sock.spool").iterdir()] == ["one@eth0"]


async def test_gc_over_the_plugin(engine: Engine) -> None:
    async with serving(await engine.node()) as node:
        await asyncio.gather(*(engine.call("ADD", f"c{number}") for number in range(6)))
        valid: dict[str, Any] = {"cni.dev/valid-attachments": [{"containerID": "c3", "ifname": "eth0"}]}
        assert (await engine.call("GC", **valid)).status == 0
        assert [record.container for record in node.attachments.records] == ["c3"]
        assert await engine.links() == {host_veth("cni:c3/eth0")}


@pytest.mark.needs("bandwidth limits (sch_tbf)")
async def test_bandwidth_is_limited_in_both_directions(engine: Engine) -> None:
    limits = {"ingressRate": 8_000_000, "ingressBurst": 160_000, "egressRate": 4_000_000, "egressBurst": 160_000}
    async with serving(await engine.node()):
        slow = await engine.call("ADD", "slow", runtimeConfig={"bandwidth": limits})
        free = await engine.call("ADD", "free")
        assert (await engine.inside("slow")).links["eth0"].shaper is not None
        kilobytes = 200
        into = await timed(talk(engine, "slow", "free", addresses(free)[0], kilobytes))
        out_of = await timed(talk(engine, "free", "slow", addresses(slow)[0], kilobytes))
        assert into > 0.12, "200 kB, of which 20 at once and the rest at 1 MB/s"
        assert out_of > 0.25
        assert (await engine.call("CHECK", "slow", prevResult=slow.document)).status == 0


async def timed(work: Any) -> float:
    started = asyncio.get_running_loop().time()
    await work
    return asyncio.get_running_loop().time() - started


async def talk(engine: Engine, client: str, server: str, address: str, kilobytes: int = 0) -> bytes:
    """A TCP connection from one container to another, the server sends; the end of what came through it."""
    family = socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6

    def listen() -> socket.socket:
        return socket.create_server((address, 7777), family=family)

    def connect() -> bytes:
        with socket.create_connection((address, 7777), timeout=5) as connection:
            came = b""
            while block := connection.recv(65536):
                came = (came + block)[-5:]
            return came

    with await asyncio.to_thread(run_in_netns, engine.fds[server], listen) as listener:
        asking = asyncio.create_task(asyncio.to_thread(run_in_netns, engine.fds[client], connect))
        listener.setblocking(False)
        async with asyncio.timeout(5):
            accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        with accepted:
            accepted.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(accepted, b"." * (kilobytes << 10) + b"hello")
        return await asking


async def test_a_del_that_is_kept_is_done_for_its_engine_whatever_an_agent_says(engine: Engine, tmp_path: Path) -> None:
    """An agent that begins in the moment of the DEL, and fails it at first: it has the DEL in its spool."""
    refusal = b'{"code":100,"msg":"the kernel refused"}'
    answers = [b"", encode_answer(1, refusal)]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.write(answers.pop(0))
        writer.close()

    async with await asyncio.start_unix_server(answer, engine.socket):
        done = await engine.call("DEL", "one")
    assert (done.status, done.document, answers) == (0, None, [])
    assert [file.name for file in (tmp_path / "cni.sock.spool").iterdir()] == ["one@eth0"]
