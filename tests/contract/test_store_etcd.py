"""What is special about etcd as a store: it is shared, its members die, its answers get lost."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
from etcdclusters import fresh_etcd, three_members

from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import Compare, EtcdUnavailable, Operation, TxnResponse
from podwire.store.etcd import EtcdStore
from podwire.store.port import ABSENT, Conflict, Delete, Event, Put, StoreError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[EtcdClient]:
    async with fresh_etcd(tmp_path) as made:
        yield made
        await made.close()


async def test_changes_of_other_keys_do_not_keep_anyone_waiting(client: EtcdClient) -> None:
    """A watch is not told of them, so that nobody could say whether it is up to date."""
    store = EtcdStore(EtcdClient(client.endpoints))
    async with aclosing(store.watch("/registry/", 2)) as events:
        await store.commit([Put("/registry/a", b"1")])
        assert [e.key for e in await anext(events)] == ["/registry/a"]
        for _ in range(3):
            await client.put("/coreos.com/network/subnets/10.5.34.0-24", b"{}")
        wanted = await store.revision()
        async with asyncio.timeout(5):
            while (await anext(events))[-1].revision < wanted:
                pass
    await store.close()


async def test_a_list_in_many_answers_is_of_one_revision(client: EtcdClient) -> None:
    store = EtcdStore(EtcdClient(client.endpoints))
    await asyncio.gather(*(store.commit([Put(f"/k/{n:04}/{m:02}", b"v") for m in range(100)]) for n in range(41)))
    page = await store.list("/k/")
    assert len(page.items) == 4100
    assert page.revision == await store.revision()
    assert [item.key for item in page.items] == sorted(item.key for item in page.items)
    assert len((await store.list("/k/", limit=2500)).items) == 2500
    await store.close()


class LosesAnswers(EtcdClient):
    """Of each transaction the first `lose` answers do not arrive."""

    lose = 0

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse:
        answer = await super().txn(compare, success, failure)
        if self.lose:
            self.lose -= 1
            raise EtcdUnavailable("lost", "the answer was lost", sent=True)
        return answer


async def test_a_lost_answer_is_neither_a_lost_nor_a_second_write(client: EtcdClient) -> None:
    lossy = LosesAnswers(client.endpoints)
    store = EtcdStore(lossy)
    lossy.lose = 2
    made = await store.commit([Put("/a", b"1", ABSENT), Put("/beside", b"1", ABSENT)])
    assert made == 2 == await store.revision()
    lossy.lose = 1
    assert await store.commit([Put("/a", b"2", made), Delete("/beside")]) == 3
    lossy.lose = 1
    assert await store.commit([Delete("/a", 3)])
    assert await store.get("/a") is None
    lossy.lose = 1
    with pytest.raises(Conflict):
        await store.commit([Put("/a", b"3", 77)])
    lossy.lose = 1
    assert await store.commit([Put("/a", b"3")]) == await store.revision() == 5
    lossy.lose = 1
    with pytest.raises(StoreError, match="not known"):
        await store.commit([Delete("/a")])
    await store.close()


async def test_killed_members_cost_no_write_and_no_event(tmp_path: Path) -> None:
    """Counters raised by compare-and-set from two processes' stores, while each member in turn is killed with SIGKILL."""
    async with AsyncExitStack() as stack:
        members = await stack.enter_async_context(three_members(tmp_path))
        urls = [member.client_url for member in members]
        stores = [EtcdStore(EtcdClient(urls[n:] + urls[:n], timeout=2.0), patience=20) for n in (0, 1)]
        for store in stores:
            stack.push_async_callback(store.close)
        start = await stores[0].revision()
        seen: list[Event] = []
        watching = asyncio.create_task(_collect(stores[1], start + 1, seen))
        stop = asyncio.Event()
        counting = [asyncio.create_task(_count(store, f"/n/{key}", stop)) for store in stores for key in ("a", "b")]
        for member in members:
            await asyncio.sleep(0.5)
            await member.end()
            await asyncio.sleep(0.8)
            await member.start()
        await asyncio.sleep(0.5)
        stop.set()
        raised = await asyncio.gather(*counting)
        finals = {item.key: int(item.value) for item in (await stores[0].list("/n/")).items}
        assert sum(raised) == sum(finals.values()) > 50
        await stores[0].commit([Put("/n/end", b"")])
        await asyncio.wait_for(watching, 10)
        for key, final in finals.items():
            assert [int(e.value or b"0") for e in seen if e.key == key] == list(range(1, final + 1))


async def _count(store: EtcdStore, key: str, stop: asyncio.Event) -> int:
    """Raise the number at `key` again and again; how often that was said to have been done."""
    done = 0
    while not stop.is_set():
        item = await store.get(key)
        number, revision = (int(item.value), item.mod_revision) if item else (0, ABSENT)
        try:
            await store.commit([Put(key, str(number + 1).encode(), revision), Put(f"/by/{id(store)}", b"", None)])
        except Conflict:
            continue
        done += 1
    return done


async def _collect(store: EtcdStore, start: int, seen: list[Event]) -> None:
    async with aclosing(store.watch("/n/", start)) as events:
        async for batch in events:
            seen.extend(batch)
            if batch[-1].key == "/n/end":
                return
