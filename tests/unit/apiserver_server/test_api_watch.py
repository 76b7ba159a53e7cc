"""watch: what is seen, from where, and when it ends."""

import asyncio
import json
from pathlib import Path

import pytest
from apirig import Api, Serve

from podwire.apiserver.config import ServerConfig
from podwire.store.sqlite import SqliteStore

CMS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/pods"
MERGE = {"Content_Type": "application/merge-patch+json"}


async def version(api: Api) -> str:
    return str((await api.ok("GET", CMS))["metadata"]["resourceVersion"])


async def test_from_a_list_on_nothing_is_missed_and_nothing_is_twice(api: Api) -> None:
    await api.configmap("a")
    async with api.watch(f"{CMS}?watch=1&resourceVersion={await version(api)}") as stream:
        await api.configmap("b")
        await api.ok("PATCH", CMS + "/a", {"data": {"k": "v"}}, **MERGE)
        await api.ok("DELETE", CMS + "/b")
        assert await stream.take(3) == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]


async def test_an_old_version_replays_the_history(api: Api) -> None:
    start = await version(api)
    await api.configmap("a")
    await api.ok("DELETE", CMS + "/a")
    async with api.watch(f"{CMS}?watch=1&resourceVersion={start}") as stream:
        added, deleted = await stream.next(), await stream.next()
    assert (added["type"], deleted["type"]) == ("ADDED", "DELETED")
    assert int(deleted["object"]["metadata"]["resourceVersion"]) > int(added["object"]["metadata"]["resourceVersion"])


async def test_history_survives_a_restart(serve: Serve, tmp_path: Path) -> None:
    first = await serve(SqliteStore.open(tmp_path / "db"))
    start = await version(first)
    await first.configmap("a")
    await first.ok("DELETE", CMS + "/a")
    await first.configmap("b")
    await first.store.close()
    second = await serve(SqliteStore.open(tmp_path / "db"))
    async with second.watch(f"{CMS}?watch=1&resourceVersion={start}") as stream:
        assert await stream.take(3) == [("ADDED", "a"), ("DELETED", "a"), ("ADDED", "b")]


async def test_without_a_version_it_starts_with_what_is_there(api: Api) -> None:
    await api.configmap("a")
    async with api.watch(CMS + "?watch=true") as stream:
        assert await stream.take(1) == [("ADDED", "a")]
        await api.configmap("b")
        assert await stream.take(1) == [("ADDED", "b")]


async def test_watch_list(api: Api) -> None:
    await api.configmap("a")
    query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    async with api.watch(f"{CMS}?{query}") as stream:
        assert await stream.take(1) == [("ADDED", "a")]
        bookmark = await stream.next()
        assert bookmark["type"] == "BOOKMARK"
        assert bookmark["object"]["kind"] == "ConfigMap"
        meta = bookmark["object"]["metadata"]
        assert meta["annotations"] == {"k8s.io/initial-events-end": "true"}
        assert meta["resourceVersion"] == await version(api)
        await api.configmap("b")
        assert await stream.take(1) == [("ADDED", "b")]
    for wrong in ("watch=true&sendInitialEvents=true", "watch=true&resourceVersionMatch=Exact&resourceVersion=1"):
        assert (await api.fails(422, "GET", f"{CMS}?{wrong}"))["reason"] == "Invalid"


async def test_bookmarks_move_on(serve: Serve) -> None:
    api = await serve(config=ServerConfig(bookmark_seconds=0.05))
    start = await version(api)
    async with api.watch(f"{CMS}?watch=1&resourceVersion={start}&allowWatchBookmarks=true") as stream:
        await api.configmap("else", "kube-system")
        async with asyncio.timeout(5):
            while (event := await stream.next())["object"]["metadata"]["resourceVersion"] == start:
                assert event["type"] == "BOOKMARK"
    async with api.watch(f"{CMS}?watch=1&resourceVersion={start}&timeoutSeconds=1") as stream:
        assert await stream.ended()


async def test_a_label_selector_sees_coming_and_going(api: Api) -> None:
    await api.configmap("a", app="web")
    start = await version(api)
    async with api.watch(f"{CMS}?watch=1&labelSelector=app%3Dweb&resourceVersion={start}") as stream:
        await api.configmap("other")
        await api.ok("PATCH", CMS + "/a", {"data": {"k": "1"}}, **MERGE)
        await api.ok("PATCH", CMS + "/a", {"metadata": {"labels": {"app": "db"}}}, **MERGE)
        await api.ok("PATCH", CMS + "/a", {"data": {"k": "2"}}, **MERGE)
        await api.ok("PATCH", CMS + "/a", {"metadata": {"labels": {"app": "web"}}}, **MERGE)
        events = [await stream.next() for _ in range(3)]
    assert [event["type"] for event in events] == ["MODIFIED", "DELETED", "ADDED"]
    left = events[1]["object"]["metadata"]
    assert left["labels"] == {"app": "web"}
    assert int(left["resourceVersion"]) > int(events[0]["object"]["metadata"]["resourceVersion"])


async def test_a_node_sees_its_own_pods_only(api: Api) -> None:
    async with (
        api.watch(PODS + "?watch=1&fieldSelector=spec.nodeName%3Dn1") as one,
        api.watch(PODS + "?watch=1&fieldSelector=spec.nodeName%3Dn2") as two,
    ):
        for name, node in (("a", "n1"), ("b", "n2"), ("c", "n1")):
            await api.pod(name)
            await api.ok("POST", f"/api/v1/namespaces/default/pods/{name}/binding", {"target": {"name": node}})
        assert await one.take(2) == [("ADDED", "a"), ("ADDED", "c")]
        assert await two.take(1) == [("ADDED", "b")]


async def test_one_object_can_be_watched(api: Api) -> None:
    await api.configmap("a")
    await api.configmap("b")
    async with api.watch(CMS + "/a?watch=1") as stream:
        assert await stream.take(1) == [("ADDED", "a")]
        await api.ok("DELETE", CMS + "/b")
        await api.ok("DELETE", CMS + "/a")
        assert await stream.take(1) == [("DELETED", "a")]


async def test_a_version_that_was_compacted_is_gone(serve: Serve) -> None:
    api = await serve(config=ServerConfig(history_seconds=0.02))
    start = await version(api)
    for name in ("a", "b", "c"):
        await api.configmap(name)
    async with asyncio.timeout(5):
        while True:
            async with api.watch(f"{CMS}?watch=1&resourceVersion={start}&timeoutSeconds=1") as stream:
                event = await stream.next()
            if event["type"] == "ERROR":
                break
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")


async def test_tables_are_watched_row_by_row(api: Api) -> None:
    accept = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"}
    async with api.watch(CMS + "?watch=1", **accept) as stream:
        await api.configmap("a")
        event = await stream.next()
    assert (event["type"], event["object"]["kind"]) == ("ADDED", "Table")
    assert event["object"]["rows"][0]["cells"][0] == "a"


async def test_both_versions_of_events_are_watched(api: Api) -> None:
    async with api.watch("/apis/events.k8s.io/v1/events?watch=1&fieldSelector=regarding.name%3Dp") as stream:
        for name in ("q", "p"):
            target = {"kind": "Pod", "name": name, "namespace": "default"}
            body = {"metadata": {"name": name}, "involvedObject": target, "message": "m", "reason": "R", "type": "Normal"}
            await api.ok("POST", "/api/v1/namespaces/default/events", body)
        event = await stream.next()
    assert (event["object"]["apiVersion"], event["object"]["note"]) == ("events.k8s.io/v1", "m")
    assert event["object"]["metadata"]["name"] == "p"


@pytest.mark.parametrize("watchers", [20])
async def test_many_watchers_see_the_same(api: Api, watchers: int) -> None:
    async def follow() -> list[str]:
        async with api.watch(f"{CMS}?watch=1&resourceVersion={start}") as stream:
            return [json.dumps(await stream.next()) for _ in range(10)]

    start = await version(api)
    following = [asyncio.create_task(follow()) for _ in range(watchers)]
    for n in range(10):
        await api.configmap(f"c{n}")
    seen = await asyncio.gather(*following)
    assert all(lines == seen[0] for lines in seen)
