"""The etcd client against Debian's etcd."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio
from etcdrig import answers, free_port, one_member

from podwire.apiserver.pki import Authority
from podwire.client.etcd import EtcdClient, etcd_tls
from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    EtcdCompacted,
    EtcdDenied,
    EtcdFutureRevision,
    EtcdLeaseNotFound,
    EtcdUnavailable,
    PutKey,
    ReadKeys,
    WatchResponse,
)
from podwire.model.errors import InvalidInput

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EtcdClient]:
    # The first endpoint does not exist: everything here also shows that the next one is asked.
    nobody = f"http://127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("etcd")
    async with one_member(folder) as member, EtcdClient([nobody, member.client_url]) as client:
        await answers(client)
        yield client


async def test_keys_are_read_as_they_were_written(etcd: EtcdClient) -> None:
    await etcd.put("keys/a", b"1")
    await etcd.put("keys/a", b"2")
    await etcd.put("keys/b", b"\x00\xff")
    await etcd.put("keysother", b"")
    a = await etcd.get("keys/a")
    assert a is not None
    assert (a.key, a.value, a.version, a.lease) == ("keys/a", b"2", 2, 0)
    assert a.mod_revision > a.create_revision > 1
    page = await etcd.read("keys/", prefix=True)
    assert [(kv.key, kv.value) for kv in page.kvs] == [("keys/a", b"2"), ("keys/b", b"\x00\xff")]
    assert await etcd.get("keys/c") is None
    assert [kv.key for kv in (await etcd.range(ReadKeys(key="keys/a\0", end="keys0"))).kvs] == ["keys/b"]


async def test_pages_of_one_revision(etcd: EtcdClient) -> None:
    for name in "abc":
        await etcd.put(f"pages/{name}", name.encode())
    first = await etcd.read("pages/", prefix=True, limit=2)
    await etcd.put("pages/b", b"changed")
    assert first.more
    assert first.count == 3
    again = await etcd.read("pages/", prefix=True, revision=first.header.revision)
    assert [kv.value for kv in again.kvs] == [b"a", b"b", b"c"]
    assert not again.more


async def test_a_transaction_does_one_list_or_the_other(etcd: EtcdClient) -> None:
    free = [Compare("txn/key", "VERSION", 0)]
    made = await etcd.txn(free, [PutKey("txn/key", b"mine"), PutKey("txn/too", b"")], [ReadKeys(key="txn/key")])
    assert made.succeeded
    lost = await etcd.txn(free, [PutKey("txn/key", b"theirs")], [ReadKeys(key="txn/key")])
    assert not lost.succeeded
    there = lost.responses[0].response_range
    assert there is not None
    assert there.kvs[0].value == b"mine"
    gone = await etcd.txn(
        [Compare("txn/key", "MOD", there.kvs[0].mod_revision)], [DeleteKeys("txn/", prefix=True, prev_kv=True)]
    )
    answer = gone.responses[0].response_delete_range
    assert answer is not None
    assert answer.deleted == 2
    assert [kv.value for kv in answer.prev_kvs] == [b"mine", b""]


async def test_a_lease_takes_its_keys_with_it(etcd: EtcdClient) -> None:
    lease = await etcd.grant(100)
    assert lease.ttl == 100
    await etcd.put("leased/key", b"", lease.id)
    kv = await etcd.get("leased/key")
    assert kv is not None
    assert kv.lease == lease.id
    assert await etcd.keep_alive(lease.id) == 100
    left = await etcd.time_to_live(lease.id)
    assert 0 < left.ttl <= left.granted_ttl == 100
    assert left.keys == (b"leased/key",)
    await etcd.revoke(lease.id)
    assert await etcd.get("leased/key") is None
    assert (await etcd.time_to_live(lease.id)).ttl <= 0
    with pytest.raises(EtcdLeaseNotFound):
        await etcd.keep_alive(lease.id)
    with pytest.raises(EtcdLeaseNotFound):
        await etcd.revoke(lease.id)
    with pytest.raises(EtcdLeaseNotFound):
        await etcd.put("leased/key", b"", lease.id)


async def take(changes: AsyncIterator[WatchResponse], count: int) -> list[WatchResponse]:
    async with asyncio.timeout(10):
        return [await anext(changes) for _ in range(count)]


async def test_a_watch_tells_the_past_and_then_what_comes(etcd: EtcdClient) -> None:
    first = await etcd.put("watched/a", b"1")
    await etcd.put("unwatched", b"")
    async with aclosing(etcd.watch("watched/", prefix=True, start_revision=first.header.revision, prev_kv=True)) as changes:
        created, past = await take(changes, 2)
        assert created.created
        assert [(e.type, e.kv.key, e.kv.value) for e in past.events] == [("PUT", "watched/a", b"1")]
        await etcd.txn([], [PutKey("watched/b", b"2"), DeleteKeys("watched/a")])
        (both,) = await take(changes, 1)
        assert sorted((e.type, e.kv.key) for e in both.events) == [("DELETE", "watched/a"), ("PUT", "watched/b")]
        assert {e.kv.mod_revision for e in both.events} == {both.header.revision}
        assert [e.prev_kv.value for e in both.events if e.prev_kv] == [b"1"]


async def test_what_was_compacted_is_said_to_be(etcd: EtcdClient) -> None:
    old = await etcd.put("compacted", b"1")
    new = await etcd.put("compacted", b"2")
    await etcd.compact(new.header.revision)
    with pytest.raises(EtcdCompacted):
        await etcd.read("compacted", revision=old.header.revision)
    with pytest.raises(EtcdCompacted):
        await etcd.compact(old.header.revision)
    with pytest.raises(EtcdFutureRevision):
        await etcd.read("compacted", revision=new.header.revision + 1000)
    async with aclosing(etcd.watch("compacted", start_revision=old.header.revision)) as changes:
        with pytest.raises(EtcdCompacted) as caught:
            await take(changes, 2)
    assert caught.value.oldest == new.header.revision


async def test_nobody_there(tmp_path: Path) -> None:
    async with EtcdClient([f"http://127.0.0.1:{free_port()}" for _ in range(2)]) as client:
        with pytest.raises(EtcdUnavailable, match="did not answer") as caught:
            await client.put("key", b"")
        assert not caught.value.sent
        with pytest.raises(EtcdUnavailable):
            await anext(client.watch("key"))


async def test_a_member_that_hangs_is_left_for_the_next(etcd: EtcdClient) -> None:
    """It accepts connections and says nothing."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as hanging:
        port = hanging.sockets[0].getsockname()[1]
        async with EtcdClient([f"http://127.0.0.1:{port}", etcd.endpoint], timeout=0.2) as client:
            with pytest.raises(EtcdUnavailable):
                await anext(client.watch("key"))
            async with aclosing(client.watch("key")) as changes:
                await take(changes, 1)
        async with EtcdClient([f"http://127.0.0.1:{port}", etcd.endpoint], timeout=0.2) as client:
            assert await client.get("nothing") is None
        async with EtcdClient([f"http://127.0.0.1:{port}", etcd.endpoint], timeout=0.2) as client:
            with pytest.raises(EtcdUnavailable) as caught:
                await client.put("key", b"")
            assert caught.value.sent, "it may have been done: the caller must look"


async def test_a_member_that_dies_ends_its_watches_and_comes_back_with_its_data(tmp_path: Path) -> None:
    async with one_member(tmp_path) as member, EtcdClient([member.client_url]) as client:
        await answers(client)
        put = await client.put("kept", b"1")
        async with aclosing(client.watch("kept")) as changes:
            await take(changes, 1)
            await member.end()
            with pytest.raises(EtcdUnavailable):
                await take(changes, 1)
        await member.start()
        await answers(client)
        async with aclosing(client.watch("kept", start_revision=put.header.revision)) as changes:
            _, past = await take(changes, 2)
            assert past.events[0].kv.value == b"1"


async def test_user_and_password(tmp_path: Path) -> None:
    async with one_member(tmp_path) as member:
        async with EtcdClient([member.client_url], user=("root", "right")) as root:
            await answers(root)  # authentication is not enabled yet: the user is not needed
            await root.call("auth/user/add", {"name": "root", "password": "right"})
            await root.call("auth/user/grant", {"user": "root", "role": "root"})
            await root.call("auth/enable", {})
        async with EtcdClient([member.client_url], user=("root", "right")) as root:
            await root.put("secret", b"1")
            root._token = "expired"
            assert await root.get("secret") is not None
            async with aclosing(root.watch("secret")) as changes:
                await take(changes, 1)
        async with EtcdClient([member.client_url], user=("root", "wrong")) as stranger:
            with pytest.raises(EtcdDenied, match="user root"):
                await stranger.get("secret")
        async with EtcdClient([member.client_url]) as nobody:
            with pytest.raises(EtcdDenied):
                await nobody.get("secret")


async def test_tls_with_certificates_on_both_sides(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority, stranger = Authority.create("etcd", now), Authority.create("somebody else", now)
    files = {"ca": authority.pair.certificate, "stranger": stranger.pair.certificate}
    for name, pair in (("server", authority.issue("etcd", ["127.0.0.1"], now)), ("node", authority.issue("node", [], now))):
        files |= {f"{name}.crt": pair.certificate, f"{name}.key": pair.key}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    server = ("--cert-file", f"{tmp_path}/server.crt", "--key-file", f"{tmp_path}/server.key")
    checks = ("--client-cert-auth", "--trusted-ca-file", f"{tmp_path}/ca")
    async with one_member(tmp_path, *server, *checks, scheme="https") as member:
        node = etcd_tls(tmp_path / "ca", tmp_path / "node.crt", tmp_path / "node.key")
        async with EtcdClient([member.client_url], tls=node) as client:
            await answers(client)
            await client.put("key", b"1")
            async with aclosing(client.watch("key")) as changes:
                await take(changes, 1)
        for tls in (etcd_tls(tmp_path / "ca"), etcd_tls(tmp_path / "stranger", tmp_path / "node.crt", tmp_path / "node.key")):
            async with EtcdClient([member.client_url], tls=tls) as client:
                with pytest.raises(EtcdUnavailable):
                    await client.get("key")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("", "node.crt", ""), "only half of a client's identity"),
        (("nothing", "", ""), "cannot be read as a file of CA certificates"),
        (("", "nothing", "nothing"), "cannot be read as certificate and key"),
    ],
)
async def test_files_that_are_no_identity(tmp_path: Path, files: tuple[str, str, str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        etcd_tls(*(tmp_path / name if name else "" for name in files))


@pytest.mark.parametrize("endpoints", [[], ["127.0.0.1:2379"], ["http://a:2379", "ftp://b"]])
async def test_endpoints_that_are_none(endpoints: list[str]) -> None:
    with pytest.raises(InvalidInput, match="etcd endpoints"):
        EtcdClient(endpoints)
