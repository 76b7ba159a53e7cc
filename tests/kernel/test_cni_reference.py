"""Beside Debian's containernetworking-plugins: results of the same shape, and one chain with theirs, in either order."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cnirig import PLUGIN, CniNode, Outcome, config, environment, execute, make_node, node_network, serving

from podwire.agent.attachrecord import AttachmentRecord
from podwire.agent.reservations import Owner
from podwire.agent.takeover import host_local_reservations
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns, current_netns
from podwire.model.cni import KERNEL_REFUSED
from podwire.model.kernelstate import Device, Link
from podwire.model.ops import ChangeLink, DelLink

REFERENCE = Path("/usr/lib/cni")

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("bridge devices", "IPv6"),
    pytest.mark.skipif(not (REFERENCE / "bridge").exists(), reason="no containernetworking-plugins"),
]


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[CniNode]:
    """In the tests' own namespace, where the reference plugins, being executed, work too."""
    fd = current_netns()
    kernel = LinuxKernel(fd)
    try:
        async with serving(await make_node(tmp_path, kernel, node_network(), tunnels=False)) as made:
            yield made
    finally:
        await kernel.apply((DelLink("cni0"), DelLink("cnitest0"), ChangeLink(Link("lo", Device(), up=True))))
        await kernel.close()
        os.close(fd)


@pytest.fixture
def netns() -> Any:
    fd = create_netns()
    yield f"/proc/{os.getpid()}/fd/{fd}"
    os.close(fd)


def theirs(directory: Path, version: str) -> dict[str, Any]:
    ranges = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]]
    return {
        "cniVersion": version,
        "name": "theirs",
        "type": "bridge",
        "bridge": "cnitest0",
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": ranges, "dataDir": str(directory / "host-local")},
    }


async def run(node: CniNode, verb: str, netns: str, document: dict[str, Any], plugin: str = "") -> Outcome:
    variables = environment(node.socket, verb, "c1", netns, CNI_PATH=str(REFERENCE)) | {"PATH": os.environ["PATH"]}
    if plugin:
        return await execute(variables, document, REFERENCE / plugin)
    return await execute(variables, document)


def shape(document: Any) -> Any:
    """Names and types, without values; of addresses the version, of links which is whose."""
    if isinstance(document, dict):
        return {key: shape(value) for key, value in document.items()}
    if isinstance(document, list):
        return [shape(value) for value in document]
    return type(document).__name__


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0"])
async def test_results_have_the_shape_of_theirs(node: CniNode, netns: str, tmp_path: Path, version: str) -> None:
    first = await run(node, "ADD", netns, theirs(tmp_path, version), "bridge")
    assert first.status == 0, first.document
    await run(node, "DEL", netns, theirs(tmp_path, version), "bridge")
    second = await run(node, "ADD", netns, config(version))
    assert shape(second.document) == shape(first.document)
    assert [ip.get("version") for ip in second.document["ips"]] == [ip.get("version") for ip in first.document["ips"]]
    assert [ip["interface"] for ip in second.document["ips"]] == [ip["interface"] for ip in first.document["ips"]]
    assert [route["dst"] for route in second.document["routes"]] == [route["dst"] for route in first.document["routes"]]
    assert "sandbox" in second.document["interfaces"][2]


async def test_loopback_is_raised_as_by_theirs(node: CniNode, netns: str) -> None:
    loopback = {"cniVersion": "1.0.0", "name": "cni-loopback", "type": "loopback"}

    async def call(verb: str, document: dict[str, Any], plugin: Path = PLUGIN) -> Outcome:
        variables = environment(node.socket, verb, "c1", netns, "lo", CNI_PATH=str(REFERENCE)) | {"PATH": os.environ["PATH"]}
        return await execute(variables, document, plugin)

    ours = await call("ADD", loopback)
    assert ours.status == 0, ours.document
    assert await call("ADD", loopback) == ours
    assert await call("ADD", loopback, REFERENCE / "loopback") == ours
    check = loopback | {"prevResult": ours.document}
    assert (await call("CHECK", check)).status == 0
    assert (await call("DEL", loopback, REFERENCE / "loopback")).status == 0, "switches it off"
    assert (await call("CHECK", check)).code == KERNEL_REFUSED
    assert (await call("DEL", loopback)).status == 0
    assert not node.reservations.all()


async def test_ours_first_theirs_after_it(node: CniNode, netns: str, tmp_path: Path) -> None:
    """Plugins that change what another has made understand our result, and their CHECK agrees with it."""
    ours = await run(node, "ADD", netns, config("1.0.0"))
    tuning = {"cniVersion": "1.0.0", "name": "podwire", "type": "tuning", "mtu": 1300, "prevResult": ours.document}
    tuning["dataDir"] = str(tmp_path)  # the default one is the machine's
    tuned = await run(node, "ADD", netns, tuning, "tuning")
    assert tuned.status == 0, tuned.document
    assert tuned.document["ips"] == ours.document["ips"]
    assert (await run(node, "CHECK", netns, tuning | {"prevResult": tuned.document}, "tuning")).status == 0
    assert (await run(node, "DEL", netns, tuning, "tuning")).status == 0
    assert (await run(node, "DEL", netns, config("1.0.0"))).status == 0


async def test_theirs_first_ours_only_for_the_ports(node: CniNode, netns: str, tmp_path: Path) -> None:
    first = await run(node, "ADD", netns, theirs(tmp_path, "1.0.0"), "bridge")
    mappings = {"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}
    second = await run(node, "ADD", netns, config("1.0.0", prevResult=first.document, **mappings))
    assert second == first, "passed on as it came"
    pod = node.host_ports["cni:c1/eth0"]
    assert pod is not None
    assert pod.ips == ("10.88.0.2", "fd00:88::2")
    assert not node.reservations.all()
    assert (await run(node, "DEL", "", config("1.0.0", **mappings))).status == 0
    assert (await run(node, "DEL", netns, theirs(tmp_path, "1.0.0"), "bridge")).status == 0
    assert node.host_ports["cni:c1/eth0"] is None


async def test_a_container_of_bridge_and_host_local_is_taken_over(node: CniNode, netns: str, tmp_path: Path) -> None:
    """Its DEL, which now comes to us, removes the link that the other plugin made."""
    assert (await run(node, "ADD", netns, theirs(tmp_path, "1.0.0"), "bridge")).status == 0
    found = list(host_local_reservations(tmp_path / "host-local" / "theirs"))
    assert {str(item.address) for item in found} == {"10.88.0.2", "fd00:88::2"}
    env = node.attachments._env
    for item in found:
        record = AttachmentRecord(
            container=item.key.container, ifname=item.key.ifname, network="theirs", since="", boot=env.boot, imported=True
        )
        await node.reservations.take_over(Owner(item.key.uid, "theirs", "c1"), (item.address,), env.clock(), record.encode())
        node.attachments._records[record.uid] = record
    before = json.dumps(sorted((await env.kernel.observe()).links))
    assert (await run(node, "DEL", netns, config("1.0.0"))).status == 0
    after = json.dumps(sorted((await env.kernel.observe()).links))
    assert before != after, "the link is gone"
    assert not node.reservations.all()
