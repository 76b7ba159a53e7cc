"""One client, several servers of one cluster: who is asked, what is asked again, and where a watch goes on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from random import Random

import pytest
from scripted_server import ScriptedServer

from podwire.client import api
from podwire.client.api import ApiClient
from podwire.client.errors import ServerError, Unavailable
from podwire.client.informer import Informer
from podwire.model.errors import InvalidInput
from podwire.model.objects import Pod
from podwire.model.resources import NODES, PODS

NOBODY = "http://127.0.0.1:1"
POD = {"metadata": {"namespace": "shop", "name": "web"}}
PODS_PATH = "/api/v1/namespaces/shop/pods"


class Pair:
    """Two servers, and clients of both."""

    def __init__(self) -> None:
        self.first, self.second = ScriptedServer(), ScriptedServer()
        self.stack = AsyncExitStack()

    async def client(self, *urls: str) -> ApiClient:
        return await self.stack.enter_async_context(ApiClient(urls or (self.first.url, self.second.url)))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    async with made.stack:
        for server in (made.first, made.second):
            await made.stack.enter_async_context(server.serve())
        yield made


def asked(server: ScriptedServer) -> list[str]:
    return [method for method, *_ in server.requests]


async def test_who_does_not_listen_is_passed_over_and_not_asked_again(pair: Pair) -> None:
    for _ in range(2):
        pair.first.answer("POST", PODS_PATH, POD, 201)
    client = await pair.client(NOBODY, pair.first.url + "/", pair.second.url)
    for _ in range(2):
        assert await client.create(PODS, POD) == POD
        assert client.base_url == pair.first.url
    assert asked(pair.second) == []


async def test_nobody_listens() -> None:
    async with ApiClient((NOBODY, "http://127.0.0.1:2")) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:2"):
            await client.create(PODS, POD)
    with pytest.raises(InvalidInput):
        ApiClient(())


async def test_a_server_that_cannot_serve_is_left(pair: Pair) -> None:
    pair.first.answer("POST", PODS_PATH, {"code": 503, "message": "etcd has no leader"}, 503)
    pair.second.answer("POST", PODS_PATH, POD, 201)
    client = await pair.client()
    with pytest.raises(ServerError, match="no leader"):
        await client.create(PODS, POD)  # whether it was done is not known
    assert await client.create(PODS, POD) == POD
    assert (asked(pair.first), asked(pair.second)) == (["POST"], ["POST"])


async def test_a_broken_connection_is_the_callers_unless_it_only_reads(pair: Pair) -> None:
    for _ in range(2):  # a GET is tried twice by aiohttp itself
        pair.first.hang_up("GET", "/api/v1/nodes/n1")
    pair.second.answer("GET", "/api/v1/nodes/n1", {"kind": "Node"})
    pair.second.hang_up("POST", PODS_PATH)
    client = await pair.client()
    assert await client.get(NODES, "n1") == {"kind": "Node"}
    with pytest.raises(Unavailable, match=pair.second.url):
        await client.create(PODS, POD)
    assert asked(pair.second) == ["GET", "POST"]
    assert client.base_url == pair.first.url


async def test_a_watch_goes_on_elsewhere_from_where_it_was(pair: Pair) -> None:
    listed = {"metadata": {"resourceVersion": "7"}, "items": []}
    pair.first.answer("GET", "/api/v1/pods", listed)
    seen = {"metadata": {"namespace": "shop", "name": "a", "uid": "1", "resourceVersion": "9"}}
    pair.first.watch("/api/v1/pods", ("ADDED", seen), break_off=True)
    missed = {"metadata": {"namespace": "shop", "name": "b", "uid": "2", "resourceVersion": "11"}}
    pair.second.watch("/api/v1/pods", ("ADDED", missed), hold=True)
    informer = Informer(await pair.client(), PODS, Pod, rng=Random(1))
    running = asyncio.create_task(informer.run())
    assert await informer.caught_up(missed)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert [key.name for key in informer.items()] == ["a", "b"]
    assert asked(pair.second) == ["WATCH"], "nothing was listed again"
    assert pair.second.requests[0][2]["resourceVersion"] == "9"


async def test_a_server_that_hangs_loses_its_watches_too(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "REQUEST_TIMEOUT", 0.3)
    pair.first.watch("/api/v1/pods", ("BOOKMARK", {}), hold=True)
    client = await pair.client()

    async def watch() -> None:
        async with aclosing(client.watch(PODS)) as events:
            async for _ in events:
                watching.set()

    watching = asyncio.Event()
    task = asyncio.create_task(watch())
    await watching.wait()
    with pytest.raises(Unavailable):
        await client.get(NODES, "n1")  # the script has no answer
    with pytest.raises(Unavailable):
        await asyncio.wait_for(task, 5)
    assert client.base_url == pair.second.url
