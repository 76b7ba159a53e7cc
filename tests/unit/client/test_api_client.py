from contextlib import aclosing
from typing import Any

import pytest
from scripted_server import ScriptedServer

from podwire.client.api import ApiClient, PatchKind
from podwire.client.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Gone,
    Invalid,
    NotFound,
    ServerError,
    TooManyRequests,
    Unavailable,
    error_from_status,
)
from podwire.model.resources import DEPLOYMENTS, NODES, PODS


async def watch_pods(client: ApiClient, seen: list[tuple[str, Any]]) -> None:
    async with aclosing(client.watch(PODS, resource_version="5")) as events:
        async for event in events:
            seen.append((event.type, event.json().get("metadata")))  # noqa: PERF401 - what came before an error counts


PODS_PATH = "/api/v1/namespaces/shop/pods"


async def test_documents_go_to_the_paths_of_their_kind() -> None:
    server = ScriptedServer()
    pod = {"metadata": {"namespace": "shop", "name": "web"}}
    server.answer("POST", PODS_PATH, pod, 201)
    server.answer("PUT", f"{PODS_PATH}/web/status", pod)
    server.answer("PATCH", "/apis/apps/v1/namespaces/shop/deployments/web", {})
    server.answer("DELETE", "/api/v1/nodes/n1", {})
    server.answer("POST", f"{PODS_PATH}/web/binding", {})
    async with server.serve() as client:
        assert await client.create(PODS, pod) == pod
        await client.replace(PODS, pod, subresource="status")
        await client.patch(DEPLOYMENTS, "web", {"a": None}, "shop", kind=PatchKind.STRATEGIC)
        await client.delete(NODES, "n1", grace_period_seconds=0, uid="u1", propagation="Foreground")
        await client.create(PODS, pod, subresource="binding")
    assert server.requests[2][3] == {"a": None}
    options = server.requests[3][3]
    assert options["gracePeriodSeconds"] == 0
    assert options["preconditions"] == {"uid": "u1"}
    assert options["propagationPolicy"] == "Foreground"


async def test_a_list_joins_its_pages() -> None:
    server = ScriptedServer()
    first = {"metadata": {"resourceVersion": "7", "continue": "next"}, "items": [{"metadata": {"name": "a"}}]}
    second = {"metadata": {"resourceVersion": "7"}, "items": [{"metadata": {"name": "b"}}]}
    server.answer("GET", PODS_PATH, first)
    server.answer("GET", PODS_PATH, second)
    async with server.serve() as client:
        found = await client.list(PODS, "shop", label_selector="app=web", limit=1)
    assert [item["metadata"]["name"] for item in found.items] == ["a", "b"]
    assert found.items[0]["kind"] == "Pod"
    assert found.resource_version == "7"
    assert server.requests[1][2] == {"labelSelector": "app=web", "limit": "1", "continue": "next"}


async def test_a_list_whose_continue_token_expires_starts_again_in_one_piece() -> None:
    server = ScriptedServer()
    server.answer("GET", PODS_PATH, {"metadata": {"resourceVersion": "7", "continue": "next"}, "items": [{}]})
    server.answer("GET", PODS_PATH, {"code": 410, "reason": "Expired"}, 410)
    server.answer("GET", PODS_PATH, {"metadata": {"resourceVersion": "9"}, "items": [{}, {}]})
    async with server.serve() as client:
        found = await client.list(PODS, "shop", limit=1)
    assert (len(found.items), found.resource_version) == (2, "9")


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (404, "NotFound", NotFound),
        (409, "AlreadyExists", AlreadyExists),
        (409, "Conflict", Conflict),
        (410, "Expired", Gone),
        (422, "Invalid", Invalid),
        (500, "InternalError", ServerError),
        (418, "Teapot", ApiError),
    ],
)
async def test_a_status_becomes_its_error(code: int, reason: str, expected: type[ApiError]) -> None:
    server = ScriptedServer()
    server.answer("GET", "/api/v1/nodes/n1", {"code": code, "reason": reason, "message": "because", "details": {"a": 1}}, code)
    async with server.serve() as client:
        with pytest.raises(ApiError, match="because") as caught:
            await client.get(NODES, "n1")
    assert type(caught.value) is expected
    assert (caught.value.code, caught.value.reason, caught.value.details) == (code, reason, {"a": 1})


def test_an_answer_that_is_no_status_still_becomes_an_error() -> None:
    error = error_from_status(b"<html>\xff", 503, "GET /x")
    assert (type(error), error.code, error.reason) == (ServerError, 503, "ServiceUnavailable")
    assert error_from_status(b"{}", 404, "GET /x").message == "GET /x was answered with HTTP status 404"


async def test_a_busy_server_is_waited_for() -> None:
    server = ScriptedServer()
    server.answer("GET", "/api/v1/nodes/n1", {"code": 429, "details": {"retryAfterSeconds": 0.01}}, 429)
    server.answer("GET", "/api/v1/nodes/n1", {"metadata": {"name": "n1"}})
    async with server.serve() as client:
        assert (await client.get(NODES, "n1"))["metadata"]["name"] == "n1"


async def test_no_server_is_unavailable_and_the_message_says_where() -> None:
    async with ApiClient("http://127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            await client.get(NODES, "n1")
    async with ApiClient("http://x", unix_socket="\0podwire-nobody-listens") as client:
        with pytest.raises(Unavailable):
            await client.get(NODES, "n1")


async def test_watch_events_come_in_order_and_an_error_event_is_raised() -> None:
    server = ScriptedServer()
    big = "x" * 300_000
    server.watch(
        "/api/v1/pods",
        ("ADDED", {"metadata": {"name": "a", "annotations": {"big": big}}}),
        ("BOOKMARK", {"metadata": {"resourceVersion": "9"}}),
        ("ERROR", {"code": 410, "reason": "Expired", "message": "too old"}),
    )
    seen: list[tuple[str, Any]] = []
    async with server.serve() as client:
        with pytest.raises(Gone, match="too old"):
            await watch_pods(client, seen)
    assert seen[0][1]["annotations"]["big"] == big
    assert [type for type, _ in seen] == ["ADDED", "BOOKMARK"]
    assert server.requests[0][2]["resourceVersion"] == "5"
    assert server.requests[0][2]["allowWatchBookmarks"] == "true"


async def test_a_broken_watch_is_unavailable() -> None:
    server = ScriptedServer()
    server.watch("/api/v1/pods", ("ADDED", {}), break_off=True)
    async with server.serve() as client:
        with pytest.raises(Unavailable):
            await watch_pods(client, [])


async def test_what_is_no_api_server_is_one_that_does_not_answer() -> None:
    """A balancer with nobody behind it, or a page to log in at: it must not end who only wanted to watch."""
    server = ScriptedServer()
    server.answer("GET", "/api/v1/pods", "<html>welcome</html>")
    server.watch("/api/v1/pods", ("ADDED", {}), text=b"upstream connect error\n")
    async with server.serve() as client:
        with pytest.raises(Unavailable, match="not of the Kubernetes API"):
            await client.list(PODS)
        seen: list[tuple[str, Any]] = []
        with pytest.raises(Unavailable, match="not of the Kubernetes API"):
            await watch_pods(client, seen)
    assert len(seen) == 1


async def test_a_busy_server_says_when_to_watch_again() -> None:
    server = ScriptedServer()
    server.answer("WATCH", "/api/v1/pods", {"code": 429}, 429, **{"Retry-After": "7"})
    async with server.serve() as client:
        with pytest.raises(TooManyRequests) as caught:
            await watch_pods(client, [])
    assert caught.value.retry_after == 7
