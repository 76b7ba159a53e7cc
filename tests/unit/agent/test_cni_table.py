"""CNI's verbs, in every version of configuration, in every case: what an engine is answered over the agent's socket."""

import asyncio
import ipaddress
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cnirig import CniNode, environment, give_network, make_node, node_network, serving

from podwire.model.cni import (
    CNI_VERSIONS,
    INCOMPATIBLE_VERSION,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    IO_FAILURE,
    KERNEL_REFUSED,
    NO_ADDRESS,
    NOT_AVAILABLE,
    NOT_AVAILABLE_LIMITED,
    TRY_LATER,
    UNDECODABLE,
    UNKNOWN_CONTAINER,
    UNSUPPORTED_FIELD,
    CniError,
)
from podwire.model.kernelstate import Device, Link
from podwire.model.ops import DelLink
from podwire.plan.naming import host_veth
from podwire.testing.fakekernel import FakeKernel
from podwire.wire.cni import decode_answer, encode_frame

NETWORK = node_network([ipaddress.ip_network("10.244.1.0/29"), ipaddress.ip_network("fd00:10:244:1::/64")])
ADDRESSES = 5
VERSIONS = ("0.1.0", "0.2.0", *CNI_VERSIONS, "2.0.0")
SINCE = {"ADD": "0.3.0", "DEL": "0.3.0", "CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
KEPT = 9
"""The status by which the agent has the plugin keep a DEL."""


class Desk:
    """A node's agent, and an engine at its socket."""

    def __init__(self, directory: Path, kernel: FakeKernel, node: CniNode) -> None:
        self.directory, self.kernel, self.node = directory, kernel, node

    async def ask(self, verb: str, version: str, changes: dict[str, str] | None = None, **more: Any) -> tuple[int, Any]:
        """Exit status and document. `changes` to the environment: "" takes a variable away."""
        netns = self.directory / "netns"
        netns.touch()
        variables = environment(self.node.socket, verb, "c1", str(netns) if verb in ("ADD", "CHECK") else "") | (changes or {})
        raw = more.pop("raw", None)
        document = {"cniVersion": version, "name": "podwire", "type": "podwire"} | more
        return await self.send(encode_frame(variables, json.dumps(document).encode() if raw is None else raw))

    async def reset(self) -> None:
        """As it was before the scene."""
        vars(self.node.reservations).pop("_transact", None)
        self.node.health.works("links")
        for record in self.node.attachments.records:
            await self.node.attachments.delete(record.key)
        assert not self.node.reservations.all()

    async def send(self, frame: bytes) -> tuple[int, Any]:
        reader, writer = await asyncio.open_unix_connection(self.node.socket)
        writer.write(frame)
        writer.write_eof()
        status, document = decode_answer(await reader.read())
        writer.close()
        await writer.wait_closed()
        return status, json.loads(document) if document else None


Scene = Callable[[Desk], Awaitable[None]]


async def nothing(desk: Desk) -> None:
    """The node as it comes."""


async def attached(desk: Desk) -> None:
    assert (await desk.ask("ADD", "1.0.0"))[0] == 0


async def link_lost(desk: Desk) -> None:
    await attached(desk)
    await desk.kernel.apply((DelLink(host_veth("cni:c1/eth0")),))


async def range_full(desk: Desk) -> None:
    for number in range(ADDRESSES):
        other = desk.directory / f"netns-{number}"
        other.touch()
        changes = {"CNI_CONTAINERID": f"other{number}", "CNI_NETNS": str(other)}
        assert (await desk.ask("ADD", "1.0.0", changes))[0] == 0


async def disk_full(desk: Desk) -> None:
    def full(statements: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    vars(desk.node.reservations)["_transact"] = full


async def links_wrong(desk: Desk) -> None:
    desk.node.health.failed("links", CniError(KERNEL_REFUSED, "the bridge is down"))


@dataclass(frozen=True)
class Case:
    """`code` 0: success. `words` stand in the message or the details."""

    verb: str
    name: str
    code: int = 0
    words: str = ""
    scene: Scene = nothing
    changes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.verb}-{self.name}"


def without(name: str) -> dict[str, str]:
    return {name: ""}


def ports(**entry: Any) -> dict[str, Any]:
    mapping = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"} | entry
    return {"runtimeConfig": {"portMappings": [mapping]}}


CASES = [
    Case("ADD", "new"),
    Case("ADD", "again", scene=attached),
    Case("ADD", "with-link-lost", scene=link_lost),
    Case("ADD", "ports", config=ports()),
    Case("ADD", "no-container", INVALID_ENVIRONMENT, "CNI_CONTAINERID", changes=without("CNI_CONTAINERID")),
    Case("ADD", "no-ifname", INVALID_ENVIRONMENT, "CNI_IFNAME", changes=without("CNI_IFNAME")),
    Case("ADD", "no-netns", INVALID_ENVIRONMENT, "CNI_NETNS", changes=without("CNI_NETNS")),
    Case("ADD", "netns-gone", INVALID_ENVIRONMENT, "/nowhere", changes={"CNI_NETNS": "/nowhere"}),
    Case(
        "ADD", "netns-of-another-kind", INVALID_ENVIRONMENT, "not a network namespace", changes={"CNI_NETNS": "/proc/self/stat"}
    ),
    Case("ADD", "container-id", INVALID_ENVIRONMENT, "../x", changes={"CNI_CONTAINERID": "../x"}),
    Case("ADD", "ifname-long", INVALID_ENVIRONMENT, "sixteen-letters-", changes={"CNI_IFNAME": "sixteen-letters-"}),
    Case("ADD", "ifname-slash", INVALID_ENVIRONMENT, "a/b", changes={"CNI_IFNAME": "a/b"}),
    Case("ADD", "args", INVALID_ENVIRONMENT, "nonsense", changes={"CNI_ARGS": "IgnoreUnknown=1;nonsense"}),
    Case("ADD", "no-network-name", INVALID_CONFIG, "missing network name", config={"name": ""}),
    Case("ADD", "network-name", INVALID_CONFIG, "a b", config={"name": "a b"}),
    Case("ADD", "mac", INVALID_CONFIG, "02:00", config={"runtimeConfig": {"mac": "02:00"}}),
    Case("ADD", "ip", INVALID_CONFIG, "10.0.0.300", config={"runtimeConfig": {"ips": ["10.0.0.300/24"]}}),
    Case("ADD", "ip-elsewhere", NO_ADDRESS, "192.0.2.1", config={"runtimeConfig": {"ips": ["192.0.2.1/24"]}}),
    Case("ADD", "port", INVALID_CONFIG, "70000", config=ports(hostPort=70000)),
    Case("ADD", "protocol", INVALID_CONFIG, "icmp", config=ports(protocol="icmp")),
    Case("ADD", "rate", INVALID_CONFIG, "burst", config={"runtimeConfig": {"bandwidth": {"ingressRate": 8}}}),
    Case("ADD", "prev-result", UNDECODABLE, "prevResult", config={"prevResult": "eth0"}),
    Case("ADD", "ipam-type", UNSUPPORTED_FIELD, 'ipam.type: "host-local"', config={"ipam": {"type": "host-local"}}),
    Case("ADD", "vlan", UNSUPPORTED_FIELD, "vlan: 7", config={"vlan": 7}),
    Case("ADD", "range-full", NO_ADDRESS, "10.244.1.0/29", scene=range_full),
    Case("ADD", "disk-full", IO_FAILURE, "disk is full", scene=disk_full),
    Case("DEL", "attached", scene=attached),
    Case("DEL", "never"),
    Case("DEL", "link-lost", scene=link_lost),
    Case("DEL", "netns-gone", scene=attached, changes={"CNI_NETNS": "/nowhere"}),
    Case("DEL", "disk-full", scene=disk_full),
    Case("DEL", "mac", config={"runtimeConfig": {"mac": "02:00"}}),
    Case("DEL", "port", scene=attached, config=ports(hostPort=70000)),
    Case("DEL", "args", scene=attached, changes={"CNI_ARGS": "nonsense"}),
    Case("DEL", "prev-result", scene=attached, config={"prevResult": "eth0"}),
    Case("DEL", "no-container", INVALID_ENVIRONMENT, "CNI_CONTAINERID", changes=without("CNI_CONTAINERID")),
    Case("DEL", "no-ifname", INVALID_ENVIRONMENT, "CNI_IFNAME", changes=without("CNI_IFNAME")),
    Case("CHECK", "as-left", scene=attached),
    Case("CHECK", "never", UNKNOWN_CONTAINER, "c1"),
    Case("CHECK", "link-lost", KERNEL_REFUSED, "link", scene=link_lost),
    Case("CHECK", "no-netns", INVALID_ENVIRONMENT, "CNI_NETNS", changes=without("CNI_NETNS")),
    Case("CHECK", "ipam-type", UNSUPPORTED_FIELD, "dhcp", config={"ipam": {"type": "dhcp"}}),
    Case("GC", "none-valid", scene=attached, config={"cni.dev/valid-attachments": []}),
    Case("GC", "nothing-there"),
    Case("GC", "entry", INVALID_CONFIG, "containerID", config={"cni.dev/valid-attachments": [{"ifname": "eth0"}]}),
    Case("STATUS", "well"),
    Case("STATUS", "range-full", NOT_AVAILABLE, "10.244.1.0/29", scene=range_full),
    Case("STATUS", "links-wrong", NOT_AVAILABLE_LIMITED, "the bridge is down", scene=links_wrong),
]


@pytest_asyncio.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """Before the node has its network."""
    kernel = FakeKernel(Link("eth0", Device(), mtu=1500))
    async with serving(await make_node(tmp_path, kernel, None, nsfs=tmp_path)) as node:
        yield Desk(tmp_path, kernel, node)


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_verbs_versions_cases(desk: Desk, case: Case) -> None:
    await give_network(desk.node, NETWORK)
    for version in VERSIONS:
        await case.scene(desk)
        status, document = await desk.ask(case.verb, version, case.changes, **case.config)
        expect(case, version, status, document)
        if case.verb in ("DEL", "GC") and status == 0:
            assert not {name for name in desk.kernel.host.links if name.startswith("veth")}
        if case.code == IO_FAILURE:
            assert not desk.node.reservations.all()
        await desk.reset()


def expect(case: Case, version: str, status: int, document: Any) -> None:
    code = case.code
    if version not in CNI_VERSIONS or CNI_VERSIONS.index(version) < CNI_VERSIONS.index(SINCE[case.verb]):
        code = code if "" in case.changes.values() else INCOMPATIBLE_VERSION  # the environment is looked at first
    if code:
        assert (status, document["code"]) == (1, code), f"{version}: {document}"
        assert document["cniVersion"] == (version if version in CNI_VERSIONS else CNI_VERSIONS[-1])
        assert document["msg"]
        if code == case.code:
            assert case.words in document["msg"] + document.get("details", "")
    elif case.verb == "ADD":
        assert status == 0, f"{version}: {document}"
        expect_result(document, version)
    else:
        assert (status, document) == (0, None), version


def expect_result(document: Any, version: str) -> None:
    """As each version of the specification has it."""
    old, new = CNI_VERSIONS.index(version) < CNI_VERSIONS.index("1.0.0"), version == "1.1.0"
    assert document.keys() == {"cniVersion", "interfaces", "ips", "routes", "dns"}
    assert document["cniVersion"] == version
    assert [entry.get("version") for entry in document["ips"]] == (["4", "6"] if old else [None, None])
    assert [entry["interface"] for entry in document["ips"]] == [2, 2]
    assert all(("mtu" in entry) == new for entry in document["interfaces"])
    assert [("sandbox" in entry) for entry in document["interfaces"]] == [False, False, True]
    assert [route["dst"] for route in document["routes"]] == ["0.0.0.0/0", "::/0"]


async def test_version_is_answered_in_every_version(desk: Desk) -> None:
    for version in VERSIONS:
        status, document = await desk.ask("VERSION", version)
        assert status == 0
        assert document["supportedVersions"] == list(CNI_VERSIONS)
        assert document["cniVersion"] == (version if version in CNI_VERSIONS else CNI_VERSIONS[-1])


@pytest.mark.parametrize(
    ("verb", "status", "code"),
    [("ADD", 1, TRY_LATER), ("DEL", KEPT, 0), ("STATUS", 1, NOT_AVAILABLE), ("CHECK", 1, UNKNOWN_CONTAINER), ("GC", 0, 0)],
)
async def test_before_the_node_has_its_subnet(desk: Desk, verb: str, status: int, code: int) -> None:
    answered, document = await desk.ask(verb, "1.1.0")
    assert (answered, document["code"] if document else 0) == (status, code)


async def test_what_is_no_configuration(desk: Desk) -> None:
    for verb in SINCE:
        for raw in (b"", b"{", b"[]", b"7", b"\xff\xfe", b"null"):
            status, document = await desk.ask(verb, "", raw=raw)
            assert (status, document["code"]) == (1, UNDECODABLE), f"{verb} with {raw!r}"


async def test_what_is_no_verb(desk: Desk) -> None:
    for verb in ("", "UPDATE", "add", "ADD "):
        status, document = await desk.ask(verb, "1.1.0")
        assert (status, document["code"]) == (1, INVALID_ENVIRONMENT)
        assert "CNI_COMMAND" in document["msg"]


async def test_what_no_plugin_has_sent(desk: Desk) -> None:
    for frame in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
        status, document = await desk.send(frame)
        assert (status, document["code"]) == (1, INVALID_ENVIRONMENT)
