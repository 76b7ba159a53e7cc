import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from scripted_server import ScriptedServer

from podwire.client.informer import Change, Informer
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod
from podwire.model.resources import ENDPOINTSLICES, PODS

PATH = "/api/v1/pods"


def pod(name: str, version: int, uid: str = "", node: str = "") -> dict[str, Any]:
    meta = {"name": name, "namespace": "shop", "resourceVersion": str(version), "uid": uid or f"uid-{name}"}
    return {"metadata": meta, "spec": {"nodeName": node}}


def listing(version: int, *items: object) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(items)}


class Story:
    """What a subscriber was told, as +name, ~name, -name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, change: Change[Pod]) -> None:
        sign = "+" if change.old is None else "-" if change.new is None else "~"
        self.lines.append(sign + change.key.name)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def running(informer: Informer[Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(informer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_list_then_watch() -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, listing(5, pod("a", 1), pod("b", 2)))
    server.watch(
        PATH,
        ("MODIFIED", pod("a", 6, node="n1")),
        ("DELETED", pod("b", 7)),
        ("ADDED", pod("c", 8)),
        hold=True,
    )
    async with server.serve() as client:
        story, informer = Story(), Informer(client, PODS, Pod, rng=Random(1))
        informer.subscribe(story)
        async with running(informer):
            await informer.synced()
            assert {key.name for key in informer.items()} >= {"a"}
            await story.until(lambda: "+c" in story.lines)
            late = Story()
            stop = informer.subscribe(late)
            stop()
        assert story.lines == ["+a", "+b", "~a", "-b", "+c"]
        assert late.lines == ["+a", "+c"]
        found = informer.get(ObjectKey("shop", "a"))
        assert found is not None
        assert found.spec.node_name == "n1"
        assert informer.resource_version == "8"
    assert server.requests[1][2]["resourceVersion"] == "5"


async def test_a_watch_that_ends_or_breaks_is_resumed_where_it_was() -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, listing(5))
    server.watch(PATH, ("ADDED", pod("a", 6)))
    server.watch(PATH, ("BOOKMARK", {"metadata": {"resourceVersion": "20"}}), break_off=True)
    server.watch(PATH, ("ADDED", pod("b", 21)), hold=True)
    async with server.serve() as client:
        story, informer = Story(), Informer(client, PODS, Pod, rng=Random(1))
        informer.subscribe(story)
        async with running(informer):
            await story.until(lambda: "+b" in story.lines)
            assert (informer.resource_version, informer.changed_version) == ("21", "21")
    resumed = [query["resourceVersion"] for method, _, query, _ in server.requests if method == "WATCH"]
    assert resumed == ["5", "6", "20"]


async def test_a_revision_that_is_gone_means_a_new_list_and_only_what_differs_is_told() -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, listing(5, pod("same", 1), pod("gone", 2), pod("changed", 3), pod("replaced", 4)))
    server.watch(PATH, ("ERROR", {"code": 410, "reason": "Expired"}))
    server.answer(
        "GET", PATH, listing(30, pod("same", 1), pod("changed", 11), pod("replaced", 12, uid="other"), pod("new", 13))
    )
    async with server.serve() as client:
        story, informer = Story(), Informer(client, PODS, Pod, rng=Random(1))
        informer.subscribe(story)
        async with running(informer):
            await story.until(lambda: "+new" in story.lines)
    assert story.lines[4:] == ["-gone", "~changed", "-replaced", "+replaced", "+new"]


async def test_a_server_that_is_away_is_tried_again() -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, {"code": 503}, 503)
    server.answer("GET", PATH, listing(5, pod("a", 1)))
    async with server.serve() as client:
        informer = Informer(client, PODS, Pod, rng=Random(1))
        async with running(informer), asyncio.timeout(5):
            await informer.synced()
    assert len(informer.items()) == 1


async def test_what_the_copy_shows_is_known_while_the_server_refuses() -> None:
    """Somebody may want to say up to where: not less than before, just because the next list has to wait."""
    server = ScriptedServer()
    server.answer("GET", PATH, listing(5, pod("a", 1)))
    server.watch(PATH, ("ERROR", {"code": 410, "reason": "Expired"}))
    server.answer("GET", PATH, {"code": 401, "reason": "Unauthorized"}, 401)
    server.answer("GET", PATH, listing(9, pod("a", 1)))
    seen = []
    async with server.serve() as client:
        informer = Informer(client, PODS, Pod, rng=Random(1))
        async with running(informer):
            for count in (1, 2, 3):
                await server.answers_given(count)
                seen.append(informer.resource_version)
            assert await informer.caught_up({"metadata": {"resourceVersion": "9"}})
    assert seen[1:] == ["5", "5"]


async def test_nulls_of_go_encoders_and_odd_objects_do_no_harm() -> None:
    server = ScriptedServer()
    slice_meta = {"name": "s", "namespace": "shop", "uid": "u", "labels": None}
    odd = {"metadata": {"name": "odd", "uid": "v"}, "endpoints": 7}
    server.answer(
        "GET",
        "/apis/discovery.k8s.io/v1/endpointslices",
        listing(5, {"metadata": slice_meta, "endpoints": None, "ports": None}, odd),
    )
    async with server.serve() as client:
        informer = Informer(client, ENDPOINTSLICES, EndpointSlice, rng=Random(1))
        async with running(informer), asyncio.timeout(5):
            await informer.synced()
    assert [key.name for key in informer.items()] == ["s"]


async def test_a_server_that_has_an_older_version_only_and_is_replaced_by_a_newer_one() -> None:
    """Kubernetes 1.20 has EndpointSlices as v1beta1, where an endpoint's place stands in its topology; 1.25 has it no more."""
    old, new = (f"/apis/discovery.k8s.io/{version}/endpointslices" for version in ("v1beta1", "v1"))
    meta = {"name": "s", "namespace": "shop", "uid": "u", "resourceVersion": "4"}
    place = {"kubernetes.io/hostname": "n1", "topology.kubernetes.io/zone": "z1"}
    endpoints = [{"addresses": ["10.0.0.1"], "topology": place}, {"addresses": ["10.0.0.2"], "topology": None}]
    server = ScriptedServer()
    server.answer("GET", new, {"code": 404}, 404)
    server.answer("GET", old, listing(5, {"metadata": meta, "endpoints": endpoints}))
    changed = {"metadata": meta | {"resourceVersion": "6"}, "endpoints": endpoints[:1]}
    server.watch(old, ("MODIFIED", changed))
    server.watch(old, ("ERROR", {"code": 410, "reason": "Expired"}))
    v1 = {"metadata": meta | {"resourceVersion": "9"}, "endpoints": [{"addresses": ["10.0.0.3"], "nodeName": "n3"}]}
    server.answer("GET", new, listing(9, v1))
    told: list[list[tuple[str, str]]] = []
    async with server.serve() as client:
        informer = Informer(client, ENDPOINTSLICES, EndpointSlice, rng=Random(1))
        informer.subscribe(lambda change: told.append([(e.node_name, e.zone) for e in change.object.endpoints]))
        async with running(informer):
            await server.answers_given(5)
            assert await informer.caught_up({"metadata": {"resourceVersion": "9"}})
    assert told == [[("n1", "z1"), ("", "")], [("n1", "z1")], [("n3", "")]]


async def test_a_writer_can_wait_until_the_copy_shows_its_write() -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, listing(5))
    server.watch(PATH, ("ADDED", pod("a", 6)), ("ADDED", pod("b", 9)), hold=True)
    async with server.serve() as client:
        informer = Informer(client, PODS, Pod, rng=Random(1))
        async with running(informer):
            assert await informer.caught_up(pod("a", 6))
            assert await informer.caught_up(pod("x", 8))
            assert await informer.caught_up(pod("x", 3))
            assert not await informer.caught_up(pod("x", 99), timeout_seconds=0.01)


async def test_a_subscriber_that_fails_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, listing(5, pod("a", 1), pod("b", 2)))

    def failing(change: Change[Pod]) -> None:
        raise ValueError("a bug")

    async with server.serve() as client:
        story, informer = Story(), Informer(client, PODS, Pod, rng=Random(1))
        informer.subscribe(failing)
        informer.subscribe(story)
        async with running(informer):
            await informer.synced()
    assert story.lines == ["+a", "+b"]
    assert "pods shop/a: a subscriber failed" in caplog.text


async def test_a_revision_that_the_server_does_not_know_yet_means_a_new_list() -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, listing(500, pod("a", 1)))
    server.watch(PATH, ("ERROR", {"code": 504, "reason": "Timeout", "message": "Too large resource version"}))
    server.answer("GET", PATH, listing(5, pod("b", 2)))
    async with server.serve() as client:
        story, informer = Story(), Informer(client, PODS, Pod, rng=Random(1))
        informer.subscribe(story)
        async with running(informer):
            await story.until(lambda: "+b" in story.lines)
    assert story.lines == ["+a", "-a", "+b"]


async def test_bookmarks_and_lists_that_bring_nothing_new_change_nothing() -> None:
    server = ScriptedServer()
    server.answer("GET", PATH, listing(5, pod("a", 1)))
    server.watch(PATH, ("BOOKMARK", {"metadata": {"resourceVersion": "20"}}), ("ERROR", {"code": 410, "reason": "Expired"}))
    server.answer("GET", PATH, listing(30, pod("a", 1)))
    server.watch(PATH, ("BOOKMARK", {"metadata": {"resourceVersion": "40"}}), ("DELETED", pod("a", 41)), hold=True)
    seen: list[tuple[str, str]] = []
    async with server.serve() as client:
        informer = Informer(client, PODS, Pod, rng=Random(1))
        story = Story()
        informer.subscribe(story)
        informer.subscribe(lambda change: seen.append((informer.resource_version, informer.changed_version)))
        async with running(informer):
            await story.until(lambda: "-a" in story.lines)
        assert (informer.resource_version, informer.changed_version) == ("41", "41")
    assert seen == [("", ""), ("40", "5")]
