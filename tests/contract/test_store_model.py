"""All drivers against a model that remembers everything, over random histories."""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
from etcdclusters import fresh_etcd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podwire.client.etcd import EtcdClient
from podwire.store.etcd import EtcdStore
from podwire.store.memory import MemoryStore
from podwire.store.port import ABSENT, Check, Compacted, Conflict, Delete, Event, Put, Store, Write
from podwire.store.sqlite import SqliteStore

KEYS = ["/a/1", "/a/2", "/a/10", "/ab", "/b/1", "/ü"]
PREFIXES = ["/", "/a", "/a/", "/b/", "/x"]


class Model:
    """The obvious store: every state ever, by revision."""

    def __init__(self) -> None:
        self.states: list[dict[str, tuple[bytes, int, int]]] = [{}, {}]
        self.events: list[tuple[str, int, bytes | None, bytes | None]] = []
        self.compacted = 0

    @property
    def revision(self) -> int:
        return len(self.states) - 1

    def commit(self, writes: Sequence[Write]) -> bool:
        """False where an expectation fails."""
        now = self.states[-1]
        for write in writes:
            if write.expected_revision is not None and write.expected_revision != now.get(write.key, (b"", 0, ABSENT))[2]:
                return False
        effective = [w for w in writes if isinstance(w, Put) or (isinstance(w, Delete) and w.key in now)]
        if effective:
            self._apply(effective, dict(now), self.revision + 1)
        return True

    def _apply(self, writes: Sequence[Write], state: dict[str, tuple[bytes, int, int]], revision: int) -> None:
        for write in writes:
            before = state.get(write.key)
            value = write.value if isinstance(write, Put) else None
            self.events.append((write.key, revision, value, before[0] if before else None))
            if value is None:
                del state[write.key]
            else:
                state[write.key] = (value, before[1] if before else revision, revision)
        self.states.append(state)


Steps = list[tuple[str, list[tuple[str, str, bytes, str]] | int]]

WRITES = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete", "check"]),
        st.sampled_from(KEYS),
        st.binary(max_size=4),
        st.sampled_from(["any", "right", "absent", "wrong"]),
    ),
    max_size=4,
    unique_by=lambda write: write[1],
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), WRITES),
        st.tuples(st.just("compact"), st.integers(0, 5)),
        st.tuples(st.just("reopen"), st.integers(0, 0)),
    ),
    max_size=25,
)


def as_write(model: Model, kind: str, key: str, value: bytes, expectation: str) -> Write:
    actual = model.states[-1].get(key, (b"", 0, ABSENT))[2]
    expected = {"any": None, "right": actual, "absent": ABSENT, "wrong": actual + 7}[expectation]
    if kind == "check":
        return Check(key, actual if expected is None else expected)
    return Put(key, value, expected) if kind == "put" else Delete(key, expected)


async def check(store: Store, model: Model) -> None:
    assert await store.revision() == model.revision
    oldest = max(1, model.compacted)
    for revision in range(oldest, model.revision + 1):
        for prefix in PREFIXES:
            page = await store.list(prefix, revision=revision)
            wanted = sorted((k, *v) for k, v in model.states[revision].items() if k.startswith(prefix))
            assert [(i.key, i.value, i.create_revision, i.mod_revision) for i in page.items] == wanted
    if model.compacted > 1:
        with pytest.raises(Compacted):
            await store.list("/", revision=model.compacted - 1)
    for prefix in ("/", "/a"):
        history = [e for e in model.events if e[1] > model.compacted and e[0].startswith(prefix)]
        if history:
            async with aclosing(store.watch(prefix, model.compacted + 1)) as events:
                seen: Sequence[Event] = await anext(events)
            assert [(e.key, e.revision, e.value, e.previous.value if e.previous else None) for e in seen] == history


Reopen = Callable[[], Store]


async def run(steps: Steps, first: Store, reopen: Reopen | None) -> None:
    store, model = first, Model()
    try:
        for name, argument in steps:
            if isinstance(argument, list):
                writes = [as_write(model, *write) for write in argument]
                if model.commit(writes):
                    assert await store.commit(writes) == model.revision
                else:
                    with pytest.raises(Conflict):
                        await store.commit(writes)
            elif name == "compact":
                model.compacted = max(model.compacted, model.revision - argument, 1)
                await store.compact(model.compacted)
            elif reopen is not None:
                await store.close()
                store = reopen()
        await check(store, model)
    finally:
        await store.close()


@given(steps=STEPS)
@settings(max_examples=60, deadline=None)
def test_memory_does_what_the_model_does(steps: Steps) -> None:
    asyncio.run(run(steps, MemoryStore(), None))


@given(steps=STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_sqlite_does_what_the_model_does(steps: Steps) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store.db"
        asyncio.run(run(steps, SqliteStore.open(path), lambda: SqliteStore.open(path)))


async def run_on_etcd(steps: Steps, directory: Path) -> None:
    async with fresh_etcd(directory) as client:
        await run(steps, EtcdStore(client), lambda: EtcdStore(EtcdClient(client.endpoints)))


@given(steps=STEPS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.timeout(90)
def test_etcd_does_what_the_model_does(steps: Steps) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run_on_etcd(steps, Path(directory)))
