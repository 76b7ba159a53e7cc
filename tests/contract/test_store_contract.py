"""What `podwire.store.port.Store` promises, over every driver."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
from etcdclusters import fresh_etcd

from podwire.store.etcd import EtcdStore
from podwire.store.memory import MemoryStore
from podwire.store.port import (
    ABSENT,
    Check,
    Compacted,
    Conflict,
    Delete,
    Event,
    FutureRevision,
    Put,
    Store,
    StoreClosed,
)
from podwire.store.sqlite import SqliteStore


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        made: Store
        if request.param == "memory":
            made = MemoryStore()
        elif request.param == "sqlite":
            made = SqliteStore.open(tmp_path / "store.db")
        else:
            made = EtcdStore(await stack.enter_async_context(fresh_etcd(tmp_path)))
        stack.push_async_callback(made.close)
        yield made


async def take(events: AsyncIterator[Sequence[Event]], count: int) -> list[Event]:
    """The next `count` events; more must not come with them."""
    found: list[Event] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            found.extend(await anext(events))
    assert len(found) == count
    return found


class TestReads:
    async def test_a_fresh_store_is_empty_at_revision_one(self, store: Store) -> None:
        assert await store.revision() == 1
        assert await store.get("/a") is None
        page = await store.list("/")
        assert (page.items, page.revision, page.more) == ((), 1, False)

    async def test_what_was_put_is_there_with_its_revisions(self, store: Store) -> None:
        first = await store.commit([Put("/a", b"1")])
        second = await store.commit([Put("/a", b"2")])
        item = await store.get("/a")
        assert item is not None
        assert (item.value, item.create_revision, item.mod_revision) == (b"2", first, second)
        assert second == first + 1 == await store.revision()

    async def test_a_key_that_comes_back_is_a_new_one(self, store: Store) -> None:
        await store.commit([Put("/a", b"1")])
        await store.commit([Delete("/a")])
        again = await store.commit([Put("/a", b"2")])
        item = await store.get("/a")
        assert item is not None
        assert item.create_revision == again

    async def test_list_is_by_prefix_in_key_order(self, store: Store) -> None:
        await store.commit([Put(key, b"") for key in ("/b/2", "/a/9", "/b/10", "/bb", "/b/1")])
        assert [item.key for item in (await store.list("/b/")).items] == ["/b/1", "/b/10", "/b/2"]

    async def test_pages_join_to_the_whole(self, store: Store) -> None:
        keys = [f"/k/{n:02}" for n in range(7)]
        await store.commit([Put(key, b"") for key in keys])
        seen: list[str] = []
        after, more = "", True
        while more:
            page = await store.list("/k/", limit=3, start_after=after)
            seen += [item.key for item in page.items]
            after, more = seen[-1], page.more
            assert len(page.items) <= 3
        assert seen == keys

    async def test_a_full_last_page_does_not_promise_more(self, store: Store) -> None:
        await store.commit([Put("/k/1", b""), Put("/k/2", b"")])
        assert not (await store.list("/k/", limit=2)).more

    async def test_the_past_can_be_listed(self, store: Store) -> None:
        first = await store.commit([Put("/a", b"1"), Put("/b", b"1")])
        await store.commit([Delete("/a"), Put("/b", b"2")])
        await store.commit([Put("/c", b"3")])
        page = await store.list("/", revision=first)
        assert {item.key: item.value for item in page.items} == {"/a": b"1", "/b": b"1"}
        assert page.revision == first
        assert (await store.list("/", revision=1)).items == ()

    async def test_the_future_cannot_be_listed(self, store: Store) -> None:
        with pytest.raises(FutureRevision) as caught:
            await store.list("/", revision=9)
        assert (caught.value.wanted, caught.value.current) == (9, 1)


class TestCommits:
    async def test_absent_means_absent(self, store: Store) -> None:
        revision = await store.commit([Put("/a", b"1", ABSENT)])
        with pytest.raises(Conflict) as caught:
            await store.commit([Put("/a", b"2", ABSENT)])
        assert (caught.value.key, caught.value.actual) == ("/a", revision)

    async def test_a_stale_revision_is_refused(self, store: Store) -> None:
        stale = await store.commit([Put("/a", b"1")])
        await store.commit([Put("/a", b"2")])
        with pytest.raises(Conflict):
            await store.commit([Put("/a", b"3", stale)])
        with pytest.raises(Conflict):
            await store.commit([Delete("/a", stale)])

    async def test_one_conflict_undoes_the_whole_commit(self, store: Store) -> None:
        await store.commit([Put("/taken", b"")])
        before = await store.revision()
        with pytest.raises(Conflict):
            await store.commit([Put("/new", b""), Put("/taken", b"", ABSENT)])
        assert await store.get("/new") is None
        assert await store.revision() == before

    async def test_all_writes_of_a_commit_share_a_revision(self, store: Store) -> None:
        revision = await store.commit([Put("/a", b""), Put("/b", b"")])
        assert {item.mod_revision for item in (await store.list("/")).items} == {revision}

    async def test_a_commit_that_changes_nothing_makes_no_revision(self, store: Store) -> None:
        before = await store.commit([Put("/a", b"")])
        assert await store.commit([Delete("/nobody")]) == before
        assert await store.commit([]) == before

    async def test_a_check_writes_nothing_and_binds_the_rest(self, store: Store) -> None:
        revision = await store.commit([Put("/guard", b"")])
        assert await store.commit([Check("/guard", revision), Check("/none", ABSENT)]) == revision
        await store.commit([Check("/guard", revision), Put("/a", b"1")])
        await store.commit([Put("/guard", b"changed")])
        for failing in (Check("/guard", revision), Check("/guard", ABSENT), Check("/none", revision)):
            with pytest.raises(Conflict) as caught:
                await store.commit([Put("/b", b""), failing])
            assert caught.value.key == failing.key
        assert await store.get("/b") is None

    async def test_of_many_at_once_exactly_one_gets_the_key(self, store: Store) -> None:
        results = await asyncio.gather(
            *(store.commit([Put("/one", str(n).encode(), ABSENT)]) for n in range(20)), return_exceptions=True
        )
        assert sum(isinstance(result, int) for result in results) == 1
        assert sum(isinstance(result, Conflict) for result in results) == 19

    async def test_writers_in_parallel_each_get_their_own_revision(self, store: Store) -> None:
        revisions = await asyncio.gather(*(store.commit([Put(f"/k/{n}", b"")]) for n in range(50)))
        assert sorted(revisions) == list(range(2, 52))

    async def test_a_caller_that_gives_up_loses_nothing_of_others(self, store: Store) -> None:
        given_up = asyncio.create_task(store.commit([Put("/a", b"")]))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        await store.commit([Put("/b", b"")])
        assert await store.get("/b") is not None


class TestWatch:
    async def test_history_then_what_comes(self, store: Store) -> None:
        first = await store.commit([Put("/a", b"1")])
        async with aclosing(store.watch("/", first)) as events:
            old = await take(events, 1)
            second = await store.commit([Put("/a", b"2")])
            new = await take(events, 1)
        assert [(e.revision, e.value) for e in old + new] == [(first, b"1"), (second, b"2")]

    async def test_an_event_knows_what_was_before(self, store: Store) -> None:
        made = await store.commit([Put("/a", b"1")])
        changed = await store.commit([Put("/a", b"2")])
        gone = await store.commit([Delete("/a")])
        async with aclosing(store.watch("/", made)) as events:
            create, change, delete = await take(events, 3)
        assert create.previous is None
        assert create.create_revision == made
        assert change.previous is not None
        assert (change.previous.value, change.previous.mod_revision) == (b"1", made)
        assert delete.previous is not None
        assert (delete.value, delete.previous.value, delete.previous.mod_revision) == (None, b"2", changed)
        assert delete.revision == gone

    async def test_live_events_are_the_same_as_replayed_ones(self, store: Store) -> None:
        async with aclosing(store.watch("/", 2)) as live:
            await store.commit([Put("/a", b"1")])
            await store.commit([Put("/a", b"2"), Put("/b", b"1")])
            await store.commit([Delete("/a")])
            seen = await take(live, 4)
        async with aclosing(store.watch("/", 2)) as replayed:
            assert await take(replayed, 4) == seen

    async def test_only_the_prefix_is_seen(self, store: Store) -> None:
        async with aclosing(store.watch("/b/", 2)) as events:
            await store.commit([Put("/a/1", b""), Put("/b/1", b"")])
            await store.commit([Put("/bb", b"")])
            await store.commit([Put("/b/2", b"")])
            assert [e.key for e in await take(events, 2)] == ["/b/1", "/b/2"]

    async def test_several_watchers_see_all(self, store: Store) -> None:
        async def follow() -> list[int]:
            async with aclosing(store.watch("/", 2)) as events:
                return [e.revision for e in await take(events, 30)]

        followers = [asyncio.create_task(follow()) for _ in range(5)]
        await asyncio.gather(*(store.commit([Put(f"/{n}", b"")]) for n in range(30)))
        for revisions in await asyncio.gather(*followers):
            assert revisions == list(range(2, 32))

    async def test_closing_the_store_ends_the_watch(self, store: Store) -> None:
        async with aclosing(store.watch("/", 2)) as events:
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            await store.close()
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(waiting, 5)


class TestCompaction:
    async def test_the_present_stays_and_the_past_goes(self, store: Store) -> None:
        first = await store.commit([Put("/a", b"1"), Put("/b", b"1")])
        second = await store.commit([Put("/a", b"2")])
        await store.commit([Put("/c", b"1")])
        await store.compact(second)
        assert [i.value for i in (await store.list("/", revision=second)).items] == [b"2", b"1"]
        assert len((await store.list("/")).items) == 3
        with pytest.raises(Compacted) as caught:
            await store.list("/", revision=first)
        assert caught.value.oldest == second

    async def test_a_watch_from_before_is_refused(self, store: Store) -> None:
        await store.commit([Put("/a", b"1")])
        revision = await store.commit([Put("/a", b"2")])
        await store.compact(revision)
        async with aclosing(store.watch("/", revision)) as events:
            with pytest.raises(Compacted):
                await anext(events)

    async def test_a_watch_from_after_still_knows_what_was_before(self, store: Store) -> None:
        revision = await store.commit([Put("/a", b"1")])
        await store.commit([Put("/a", b"2")])
        await store.compact(revision)
        async with aclosing(store.watch("/", revision + 1)) as events:
            (event,) = await take(events, 1)
        assert event.previous is not None
        assert event.previous.value == b"1"

    async def test_revisions_go_on_after_all_was_deleted_and_compacted(self, store: Store) -> None:
        await store.commit([Put("/a", b"1")])
        last = await store.commit([Delete("/a")])
        await store.compact(last)
        assert await store.revision() == last
        assert await store.commit([Put("/b", b"")]) == last + 1

    async def test_the_future_cannot_be_compacted(self, store: Store) -> None:
        with pytest.raises(FutureRevision):
            await store.compact(100)

    async def test_compacting_again_further_back_changes_nothing(self, store: Store) -> None:
        for n in range(5):
            await store.commit([Put("/a", str(n).encode())])
        await store.compact(5)
        await store.compact(3)
        assert (await store.list("/", revision=5)).items[0].value == b"3"


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreClosed):
        await store.get("/a")
    with pytest.raises(StoreClosed):
        await store.commit([Put("/a", b"")])
