"""`podwire ipam` and `podwire cni`, on a record that an agent has written, and on other plugins' folders."""

import asyncio
import json
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cnirig import config, environment, make_node, node_network, serving

from podwire.agent.nodelock import NodeLock
from podwire.agent.registration import read_machine
from podwire.agent.reservations import Owner
from podwire.cli.main import main
from podwire.model.kernelstate import Device, Link
from podwire.testing.fakekernel import FakeKernel
from podwire.wire.cni import parse_request

NETWORK = node_network()


def run(*arguments: str | Path, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    return done


def with_node(directory: Path, work: Callable[[Any], Awaitable[None]]) -> None:
    """Do `work` on an agent of that state directory, then end it."""

    async def life() -> None:
        kernel = FakeKernel(Link("eth0", Device(), mtu=1500))
        node = await make_node(directory / "agent", kernel, NETWORK, nsfs=directory)
        async with serving(node):
            await work(node)

    asyncio.run(life())


def add(node: Any, directory: Path, name: str, **more: str) -> Awaitable[Any]:
    netns = directory / name
    netns.touch()
    request = parse_request(environment(Path("/none"), "ADD", name, str(netns), **more), json.dumps(config()).encode())
    result: Awaitable[Any] = node.attachments.add(request, None)
    return result


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """The state directory of a node that has a pod and two containers, of which one is no more."""

    async def work(node: Any) -> None:
        await node.reservations.reserve(Owner("uid-1", "shop", "web"), NETWORK.pod_cidrs, node.attachments._env.clock())
        await add(node, tmp_path, "c1", CNI_ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db")
        await add(node, tmp_path, "c2")

    with_node(tmp_path, work)
    (tmp_path / "c2").unlink()
    return tmp_path


def test_ls(used: Path) -> None:
    lines = run("ipam", "ls", "--state-dir", used).output.splitlines()
    assert len(lines) == 1 + 6
    assert lines[1].split()[:2] == ["10.244.1.2", "shop/web"]
    assert lines[3].split()[1] == "shop/db"
    assert lines[3].split()[3:] == ["c1", "eth0"]
    documents = json.loads(run("ipam", "ls", "--state-dir", used, "-o", "json").output)
    assert [d["address"] for d in documents if d.get("container") == "c2"] == ["10.244.1.4", "fd00:10:244:1::4"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.244.1.2", "held by shop/web since"),
        ("10.244.1.3", "interface eth0 of container c1 in network podwire, in namespace"),
        ("10.244.1.4", "which is gone"),
        ("10.244.1.1", "the gateway of 10.244.1.0/24"),
        ("10.244.1.255", "never given"),
        ("10.244.1.9", "free: 3 of the 253 addresses of 10.244.1.0/24 are held"),
        ("192.0.2.1", "none of this node's: its subnets are 10.244.1.0/24, fd00:10:244:1::/64"),
    ],
)
def test_explain(used: Path, address: str, words: str) -> None:
    assert words in run("ipam", "explain", address, "--state-dir", used).output


def test_explain_says_what_is_wrong(tmp_path: Path) -> None:
    assert "not an IP address" in run("ipam", "explain", "banana", "--state-dir", tmp_path, status=2).output
    assert "no record of reservations" in run("ipam", "explain", "10.0.0.1", "--state-dir", tmp_path, status=1).output


def test_gc_asks_the_agent(tmp_path: Path) -> None:
    async def work(node: Any) -> None:
        await add(node, tmp_path, "c1")
        await add(node, tmp_path, "c2")
        (tmp_path / "c1").unlink()
        kernel = node.attachments._env.kernel
        for label in [label for label in kernel.namespaces if "c1" in label]:
            kernel.destroy(label)
        done = await asyncio.to_thread(run, "ipam", "gc", "--cni-socket", node.socket)
        assert done.output == "1 attachment freed\n"
        assert {record.container for record in node.attachments.records} == {"c2"}

    with_node(tmp_path, work)
    assert "no agent serves" in run("ipam", "gc", "--cni-socket", tmp_path / "none", status=1).output


# --- other plugins' folders ---------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """host-local's folder as its versions write it, and flannel's."""
    folder = tmp_path / "networks" / "cbr0"
    folder.mkdir(parents=True)
    (folder / "10.244.1.7").write_bytes(b"old1\r\neth0")
    (folder / "10.244.1.8").write_bytes(b"old2")
    (folder / "fd00:10:244:1::7").write_bytes(b"old1\r\neth0")
    (folder / "last_reserved_ip.0").write_text("10.244.1.8")
    (folder / "lock").touch()
    flannel = tmp_path / "flannel"
    flannel.mkdir()
    ipam = {"type": "host-local", "dataDir": str(tmp_path / "networks")}
    for name in ("old1", "old2"):
        (flannel / name).write_text(json.dumps({"name": "cbr0", "type": "bridge", "ipam": ipam}))
    (flannel / "broken").write_text("{")
    return tmp_path


@pytest.mark.parametrize("arguments", [("{}/networks/cbr0",), ("--flannel", "{}/flannel")])
def test_what_others_gave_is_not_given_again(theirs: Path, arguments: tuple[str, ...]) -> None:
    state = theirs / "state"
    done = run("ipam", "import", *(argument.format(theirs) for argument in arguments), "--state-dir", state)
    assert done.output.endswith("3 addresses taken over\n")
    run("ipam", "import", theirs / "networks/cbr0", "--state-dir", state)  # again: the same
    explained = run("ipam", "explain", "10.244.1.7", "--state-dir", state).output
    assert "cbr0/old1" in explained
    assert "taken over from another plugin" in explained

    async def work(node: Any) -> None:
        given = [str((await add(node, theirs, f"c{number}")).ips[0].address.ip) for number in range(6)]
        assert given == [f"10.244.1.{last}" for last in (2, 3, 4, 5, 6, 9)]
        await node.attachments.delete(parse_request(environment(Path("/"), "DEL", "old1"), json.dumps(config()).encode()).key)
        assert {r.uid for r in node.reservations.all()} >= {"cni:old2/eth0"}
        assert not node.reservations.of("cni:old1/eth0")

    async def life() -> None:
        kernel = FakeKernel(Link("eth0", Device(), mtu=1500))
        boot = read_machine().boot_id
        async with serving(await make_node(state / "agent", kernel, NETWORK, nsfs=theirs, boot=boot)) as node:
            await work(node)

    asyncio.run(life())


def test_import_refuses_beside_an_agent_and_without_folder(theirs: Path) -> None:
    state = theirs / "state"
    (state / "agent").mkdir(parents=True)
    lock = NodeLock(state / "agent")
    done = run("ipam", "import", theirs / "networks/cbr0", "--state-dir", state, status=1)
    lock.close()
    assert "another agent works with" in done.output
    assert "say what to take over" in run("ipam", "import", "--state-dir", state, status=2).output


# --- installing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["python", "compiled"])
def test_install(tmp_path: Path, how: str) -> None:
    bins, confs = tmp_path / "bin", tmp_path / "net.d"
    more = ["--python"] if how == "python" else []
    done = run("cni", "install", "--bin-dir", bins, "--conf-dir", confs, "--cni-socket", tmp_path / "x.sock", *more)
    if f"({how})" not in done.output:
        pytest.skip("no C compiler")
    plugin = bins / "podwire"
    version = subprocess.run([plugin], env={"CNI_COMMAND": "VERSION"}, input=b"{}", capture_output=True, check=True)
    assert json.loads(version.stdout)["cniVersion"] == "1.1.0"
    variables = {"CNI_COMMAND": "STATUS"}
    status = subprocess.run([plugin], env=variables, input=json.dumps(config()).encode(), capture_output=True, check=False)
    assert status.returncode == 1
    assert json.loads(status.stdout)["code"] == 50
    assert str(tmp_path / "x.sock") in status.stdout.decode()
    document = json.loads((confs / "10-podwire.conflist").read_text())
    assert document["plugins"][0]["capabilities"]["portMappings"] is True
    assert [file.name for file in confs.iterdir()] == ["10-podwire.conflist"]
    assert sorted(file.name for file in bins.iterdir()) == ["loopback", "podwire"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--network", ""], "no name of a network"),
        (["--network", "a b"], "no name of a network"),
        (["--network", "../x"], "no name of a network"),
        (["--cni-socket", "cni.sock"], "is not absolute"),
    ],
)
def test_what_no_plugin_could_serve_is_not_installed(tmp_path: Path, arguments: list[str], words: str) -> None:
    bins, confs = tmp_path / "bin", tmp_path / "net.d"
    done = run("cni", "install", "--bin-dir", bins, "--conf-dir", confs, *arguments, status=1)
    assert words in done.output
    assert not bins.exists()
    assert not confs.exists()
