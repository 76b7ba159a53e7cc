"""A node and the servers of its cluster: which it believes, and where it goes when one fails."""

from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from scripted_server import ScriptedServer

from podwire.apiserver.joining import CA_PATH
from podwire.apiserver.pki import Authority
from podwire.client.api import ApiClient
from podwire.client.errors import Unavailable
from podwire.hosts.errors import HostError
from podwire.hosts.membership import ClusterSettings, JoinToken, Membership, Record, join, parse_servers
from podwire.model.errors import InvalidInput
from podwire.model.resources import NODES

NODE_PATH = "/api/v1/nodes/n1"


def authority() -> Authority:
    return Authority.create("podwire", datetime.now(UTC))


async def serve(stack: AsyncExitStack, signed_by: Authority, host: str = "127.0.0.1") -> ScriptedServer:
    """One whose certificate is for `host`."""
    server = ScriptedServer()
    await stack.enter_async_context(server.serve(signed_by.server_context(signed_by.issue("s", [host], datetime.now(UTC)))))
    return server


def member(state: Path, of: Authority, *servers: str) -> Membership:
    record = Record(servers, "n1", ("198.18.7.2",), "token", ClusterSettings(("10.244.0.0/16",), ("10.96.0.0/12",)))
    return Membership(state, record, of.pair.certificate, of.issue("n1", [], datetime.now(UTC)))


async def test_each_server_is_verified() -> None:
    """One with another authority's certificate, or another's name in it, is passed over: it gets no request, nor a token."""
    ours, theirs = authority(), authority()
    async with AsyncExitStack() as stack:
        impostor, misnamed = await serve(stack, theirs), await serve(stack, ours, "192.0.2.1")
        genuine = await serve(stack, ours)
        genuine.answer("POST", "/api/v1/nodes", {"kind": "Node"}, 201)
        tls = ours.client_context()
        async with ApiClient((impostor.url, misnamed.url, genuine.url), ssl=tls, token="secret") as client:
            assert await client.create(NODES, {"metadata": {"name": "n1"}}) == {"kind": "Node"}
        async with ApiClient((impostor.url, misnamed.url), ssl=tls) as client:
            with pytest.raises(Unavailable, match="certificate"):
                await client.get(NODES, "n1")
        assert impostor.requests == misnamed.requests == []


async def test_a_node_changes_over_to_other_servers_of_its_cluster(tmp_path: Path) -> None:
    ours, theirs = authority(), authority()
    async with AsyncExitStack() as stack:
        server, other_cluster = await serve(stack, ours), await serve(stack, theirs)
        membership = member(tmp_path, ours, "https://192.0.2.1:6443")
        with pytest.raises(HostError, match="leave"):
            await membership.move_to((other_cluster.url,))
        assert membership.record.servers == ("https://192.0.2.1:6443",)
        server.answer("GET", NODE_PATH, {"kind": "Node"})
        await membership.move_to((other_cluster.url, server.url))
        (tmp_path / "ca.crt").write_bytes(ours.pair.certificate)
        pair = ours.issue("n1", [], datetime.now(UTC))
        (tmp_path / "node.pem").write_bytes(pair.key + pair.certificate)
        loaded = Membership.load(tmp_path)
        assert loaded is not None
        assert loaded.record == membership.record
        assert loaded.record.servers == (other_cluster.url, server.url)


async def test_a_server_of_another_authority_than_the_tokens_is_refused(tmp_path: Path) -> None:
    ours, theirs = authority(), authority()
    async with AsyncExitStack() as stack:
        server = await serve(stack, theirs)
        server.answer("GET", CA_PATH, theirs.pair.certificate)
        token = JoinToken("abcdef.0123456789abcdef", ours.fingerprint)
        with pytest.raises(HostError, match="another fingerprint"):
            await join(tmp_path, (server.url,), token, "n1", ["198.18.7.2"])
        assert [path for _, path, *_ in server.requests] == [CA_PATH], "it was not shown the token"
    with pytest.raises(InvalidInput):
        JoinToken.parse("abcdef.0123456789abcdef")


def test_servers_by_their_urls() -> None:
    assert parse_servers("https://192.0.2.1:6443/") == ("https://192.0.2.1:6443",)
    assert parse_servers("https://a, https://[2001:db8::1]:6443") == ("https://a", "https://[2001:db8::1]:6443")
    for wrong in (
        "",
        "192.0.2.1:6443",
        "http://192.0.2.1",
        "https://",
        "https://a:x",
        "https://a:99999",
        "https://a:0",
        "https://a,",
        "https://a,https://a/",
    ):
        with pytest.raises(InvalidInput):
            parse_servers(wrong)
