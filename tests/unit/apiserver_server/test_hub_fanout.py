"""The watch cache: what is encoded how often, who is looked at, what a slow or a failing part does."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.apiserver import hub as hub_module
from podwire.apiserver.housekeeping import History, remove_old_events
from podwire.apiserver.hub import Entry, Hub, Interest, Watcher
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.kinds.base import Kind
from podwire.apiserver.selectors import parse_fields, parse_labels
from podwire.model.resources import PODS
from podwire.store.memory import MemoryStore
from podwire.store.port import Delete, Event, Put, StoreClosed, StoreError

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def pods() -> Kind:
    kind = REGISTRY.by_kind(PODS.api_version, PODS.kind)
    assert kind is not None
    return kind


def pod(name: str, node: str = "", **labels: str) -> Put:
    meta = {"name": name, "namespace": "default", "uid": name, "labels": labels}
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"nodeName": node}}
    return Put(f"/registry/pods/default/{name}", msgspec.json.encode(document))


def on_node(name: str) -> Interest:
    return Interest(fields=parse_fields(f"spec.nodeName={name}", {"spec.nodeName": ""}))


def seen(watcher: Watcher) -> list[tuple[str, str]]:
    lines = b"".join(watcher._lines).splitlines()
    events = [msgspec.json.decode(line) for line in lines]
    return [(event["type"], event["object"]["metadata"]["name"]) for event in events]


async def running(store: MemoryStore) -> tuple[Hub, asyncio.Task[None]]:
    hub = Hub(store, REGISTRY, lambda: NOW)
    task = asyncio.create_task(hub.run())
    await hub.up_to_date()
    return hub, task


async def test_a_line_is_encoded_once_for_all_who_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    hub, task = await running(store)
    shelf = hub.shelf(pods())
    interests = [Interest(), Interest(namespace="default"), Interest(labels=parse_labels("!x"))]
    watchers = [shelf.watch(pods(), interest, hub.revision) for interest in interests for _ in range(10)]
    made: list[bytes] = []
    original = hub_module.event_line

    def counting(type_: str, document: bytes) -> bytes:
        made.append(document)
        return original(type_, document)

    monkeypatch.setattr(hub_module, "event_line", counting)
    await store.commit([pod("a")])
    await hub.up_to_date()
    assert len(made) == 1
    assert len({id(watcher._lines[0]) for watcher in watchers}) == 1
    await store.close()
    await task


async def test_pods_of_other_nodes_are_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    hub, task = await running(store)
    shelf = hub.shelf(pods())
    watchers = {f"n{n}": shelf.watch(pods(), on_node(f"n{n}"), hub.revision) for n in range(50)}
    looked: list[Interest] = []
    original = Interest.matches

    def counting(self: Interest, kind: Kind, entry: Entry) -> bool:
        looked.append(self)
        return original(self, kind, entry)

    monkeypatch.setattr(Interest, "matches", counting)
    await store.commit([pod("a", "n7")])
    await store.commit([pod("a", "n8")])
    await hub.up_to_date()
    assert set(looked) == {on_node("n7"), on_node("n8")}
    assert seen(watchers["n7"]) == [("ADDED", "a"), ("DELETED", "a")]
    assert seen(watchers["n8"]) == [("ADDED", "a")]
    await store.close()
    await task


async def test_what_nobody_watches_any_more_is_forgotten() -> None:
    store = MemoryStore()
    hub, task = await running(store)
    shelf = hub.shelf(pods())
    watcher = shelf.watch(pods(), on_node("n1"), hub.revision)
    shelf.unwatch(pods(), on_node("n1"), watcher)
    shelf.unwatch(pods(), on_node("n1"), watcher)
    assert not shelf._groups
    assert not shelf._pinned
    await store.close()
    await task


async def test_who_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "BACKLOG_LIMIT", 3)
    watcher = Watcher()
    for _ in range(5):
        watcher.put(b"x")
    assert watcher.ended
    assert await watcher.take(0) == b"xxx"


async def test_an_object_that_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    await store.commit([Put("/registry/pods/default/broken", b"{"), pod("fine")])
    hub, task = await running(store)
    assert [entry.name for entry in hub.shelf(pods()).select(pods(), Interest())] == ["fine"]
    assert "/registry/pods/default/broken cannot be read" in caplog.text
    await store.commit([Delete("/registry/pods/default/broken")])
    await hub.up_to_date()
    await store.close()
    await task


class FlakyStore(MemoryStore):
    """Its first watch breaks off after one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = 0

    async def _break(self, prefix: str, from_revision: int) -> AsyncGenerator[Sequence[Event], None]:
        async for batch in super().watch(prefix, from_revision):
            yield batch
            self.broken += 1
            raise StoreError("the connection broke")

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Sequence[Event], None]:
        return self._break(prefix, from_revision) if not self.broken else super().watch(prefix, from_revision)


async def test_a_store_that_breaks_off_is_followed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", 0.01)
    store = FlakyStore()
    hub, task = await running(store)
    watcher = hub.shelf(pods()).watch(pods(), Interest(), hub.revision)
    await store.commit([pod("a")])
    await hub.up_to_date()
    await store.commit([pod("b")])
    async with asyncio.timeout(5):
        await hub.up_to_date()
    assert store.broken == 1
    assert watcher.ended
    assert [entry.name for entry in hub.shelf(pods()).select(pods(), Interest())] == ["a", "b"]
    await store.close()
    await task


async def test_who_waits_for_a_store_that_closes_is_told() -> None:
    store = MemoryStore()
    hub, task = await running(store)
    waiting = asyncio.create_task(hub.at_least(hub.revision + 1))
    await asyncio.sleep(0)
    await store.close()
    await task
    with pytest.raises(StoreClosed):
        await waiting


STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "n1", "n2", None]), st.booleans()), max_size=12)


@given(steps=STEPS, resume=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_a_watch_from_any_point_ends_with_what_is_there(steps: list[Any], resume: int) -> None:
    """List at a revision, then its watch: replaying the events gives the list of now. For every kind of selector."""

    async def run() -> None:
        store = MemoryStore()
        hub, task = await running(store)
        shelf, kind = hub.shelf(pods()), pods()
        interests = [Interest(), on_node("n1"), Interest(labels=parse_labels("l")), Interest(labels=parse_labels("!l"))]
        started: dict[Interest, tuple[set[str], Watcher]] = {}
        for number, (name, node, labelled) in enumerate([*steps, (None, None, False)]):
            if number == min(resume, len(steps)):
                for interest in interests:
                    held = {entry.name for entry in shelf.select(kind, interest)}
                    started[interest] = (held, shelf.watch(kind, interest, hub.revision))
            if name is None:
                break
            key = f"/registry/pods/default/{name}"
            await store.commit([Delete(key) if node is None else pod(name, node, **({"l": "1"} if labelled else {}))])
            await hub.up_to_date()
        for interest, (held, watcher) in started.items():
            for type_, name in seen(watcher):
                assert (name in held) == (type_ != "ADDED")
                (held.discard if type_ == "DELETED" else held.add)(name)
            assert held == {entry.name for entry in shelf.select(kind, interest)}
        await store.close()
        await task

    asyncio.run(run())


def test_history_goes_by_age() -> None:
    history = History(timedelta(seconds=60))
    assert history.mark(NOW, 10) == 0
    assert history.mark(NOW + timedelta(seconds=30), 20) == 0
    assert history.mark(NOW + timedelta(seconds=65), 30) == 10
    assert history.mark(NOW + timedelta(seconds=95), 40) == 20
    assert history.mark(NOW + timedelta(seconds=96), 40) == 0


async def test_old_events_go() -> None:
    store = MemoryStore()

    def event(name: str, created: str, last: str | None) -> Put:
        body = {"metadata": {"name": name, "creationTimestamp": created}, "lastTimestamp": last}
        return Put(f"/registry/events/default/{name}", msgspec.json.encode(body))

    old, new = "2025-12-31T00:00:00Z", "2026-01-01T00:00:00Z"
    await store.commit([event(f"x{n:03}", old, None) for n in range(150)])
    await store.commit([event("again", old, new), event("new", new, None)])
    assert await remove_old_events(store, NOW - timedelta(hours=1)) == 150
    assert [item.key[-5:] for item in (await store.list("/registry/events/")).items] == ["again", "t/new"]
    assert await remove_old_events(store, NOW - timedelta(hours=1)) == 0
    await store.close()
