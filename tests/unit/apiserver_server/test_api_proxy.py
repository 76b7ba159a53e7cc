"""pods/log and pods/exec: through the server to the pod's node, and what is said when that cannot be."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from apirig import Api, Serve

from podwire.apiserver.config import KubeletAccess, ServerConfig
from podwire.apiserver.proxy import node_endpoint, pick_container
from podwire.apiserver.status import StatusError, failure

PODS = "/api/v1/namespaces/default/pods"
WAITING = 'container "waiting" in pod "p" is waiting to start: CreateContainerConfigError'
NOT_STARTED = failure(400, "BadRequest", WAITING)
ERROR_CHANNEL = b'\x03{"status":"Success"}'


class FakeKubelet:
    """Answers as a node's agent does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[tuple[str, str]], str]] = []
        self.go_on = asyncio.Event()
        self.port = 0

    def _note(self, request: web.Request) -> None:
        self.asked.append((request.path, list(request.query.items()), request.headers.get("Authorization", "")))

    async def log(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        if request.match_info["container"] == "early":
            return web.Response(status=400, text='container "early" in pod "p" is waiting to start: PodInitializing')
        if request.match_info["container"] == "waiting":
            return web.json_response(NOT_STARTED, status=400)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one\n")
        if "follow" in request.query:
            await self.go_on.wait()
        await response.write(b"two\n")
        return response

    async def exec(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        if request.match_info["container"] == "waiting":
            return web.json_response(NOT_STARTED, status=400)
        if "Upgrade" not in request.headers:
            return web.json_response(failure(426, "UpgradeRequired", "a WebSocket is needed"), status=426)
        near = web.WebSocketResponse(protocols=("v5.channel.k8s.io", "v4.channel.k8s.io"))
        await near.prepare(request)
        await near.send_bytes(b"\x01" + "|".join(request.query.getall("command")).encode())
        async for message in near:
            if message.data == b"\xff\x00":
                break
            await near.send_bytes(b"\x01" + message.data[1:].upper())
        await near.send_bytes(ERROR_CHANNEL)
        await near.close()
        return near


@pytest.fixture
async def kubelet() -> AsyncIterator[FakeKubelet]:
    fake = FakeKubelet()
    app = web.Application()
    app.router.add_get("/containerLogs/{ns}/{pod}/{container}", fake.log)
    app.router.add_get("/exec/{ns}/{pod}/{container}", fake.exec)
    listening = socket.create_server(("127.0.0.1", 0))
    fake.port = listening.getsockname()[1]
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.SockSite(runner, listening).start()
    yield fake
    fake.go_on.set()
    await runner.cleanup()


@pytest.fixture
async def placed(serve: Serve, kubelet: FakeKubelet) -> Api:
    """A server with pod p (containers main and early) on node n1, whose agent is the fake."""
    api = await serve(config=ServerConfig(kubelet=KubeletAccess(token="node-token")))
    node = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.port}},
    }
    await api.ok("POST", "/api/v1/nodes", {"metadata": {"name": "n1"}})
    await api.ok("PATCH", "/api/v1/nodes/n1/status", {"status": node}, Content_Type="application/merge-patch+json")
    containers = [{"name": name, "image": "x"} for name in ("main", "early", "waiting")]
    await api.pod("p", containers=containers, nodeName="n1")
    return api


async def test_a_log_comes_from_the_node(placed: Api, kubelet: FakeKubelet) -> None:
    path = PODS + "/p/log?container=main&tailLines=5&timestamps=true&container=main"
    answer = await placed("GET", path, Accept="text/plain")
    assert (answer.code, answer.body) == (200, b"one\ntwo\n")
    path, query, authorization = kubelet.asked[0]
    assert path == "/containerLogs/default/p/main"
    assert dict(query) == {"tailLines": "5", "timestamps": "true"}
    assert authorization == "Bearer node-token"


async def test_a_followed_log_comes_as_it_is_written(placed: Api, kubelet: FakeKubelet) -> None:
    async with placed.session.get(f"http://api{PODS}/p/log?container=main&follow=true") as response:
        assert await asyncio.wait_for(response.content.readline(), 5) == b"one\n"
        kubelet.go_on.set()
        assert await asyncio.wait_for(response.content.readline(), 5) == b"two\n"


async def test_the_nodes_refusal_is_passed_on(placed: Api) -> None:
    status = await placed.fails(400, "GET", PODS + "/p/log?container=early")
    assert status["message"] == 'container "early" in pod "p" is waiting to start: PodInitializing'


async def test_of_the_nodes_status_the_message_is_passed_on(placed: Api) -> None:
    status = await placed.fails(400, "GET", PODS + "/p/log?container=waiting")
    assert (status["message"], status["reason"]) == (WAITING, "BadRequest")
    url = f"http://api{PODS}/p/exec?container=waiting&command=true&stdout=true"
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Protocol": "v5.channel.k8s.io"}
    async with placed.session.get(url, headers=upgrade) as answer:
        said = await answer.json()
    assert (answer.status, said["message"], said["reason"]) == (400, WAITING, "BadRequest")
    path = PODS + "/p/exec?container=waiting&command=true&stdout=true"  # what kubectl shows is the answer to its second try
    assert (await placed.fails(400, "POST", path, Upgrade="SPDY/3.1"))["message"] == WAITING


async def test_which_container_must_be_clear(placed: Api) -> None:
    status = await placed.fails(400, "GET", PODS + "/p/log")
    assert status["message"] == "a container name must be specified for pod p, choose one of: [main early waiting]"
    assert "is not valid for pod p" in (await placed.fails(400, "GET", PODS + "/p/log?container=x"))["message"]
    await placed.fails(404, "GET", PODS + "/q/log")


async def test_a_pod_without_a_node_has_no_log(placed: Api) -> None:
    await placed.pod("q")
    assert (await placed.fails(400, "GET", PODS + "/q/log"))["message"] == "pod q does not have a host assigned"


async def test_a_node_that_does_not_answer_is_a_502(placed: Api) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    status = {"status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}}
    await placed.ok("PATCH", "/api/v1/nodes/n1/status", status, Content_Type="application/merge-patch+json")
    assert "does not answer" in (await placed.fails(502, "GET", PODS + "/p/log?container=main"))["message"]


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io"])
async def test_exec_joins_two_websockets(placed: Api, kubelet: FakeKubelet, protocol: str) -> None:
    url = f"http://api{PODS}/p/exec?container=main&command=echo&command=a+b&stdin=true&stdout=true"
    async with placed.session.ws_connect(url, protocols=("SPDY", protocol)) as near:
        assert near.protocol == protocol
        assert await near.receive_bytes() == b"\x01echo|a b"
        await near.send_bytes(b"\x00hello")
        assert await near.receive_bytes() == b"\x01HELLO"
        await near.send_bytes(b"\xff\x00")
        assert await near.receive_bytes() == ERROR_CHANNEL
        assert (await near.receive()).type is aiohttp.WSMsgType.CLOSE
    path, query, _ = kubelet.asked[0]
    assert path == "/exec/default/p/main"
    assert ("container", "main") not in query


async def test_exec_without_websocket_says_what_to_do(placed: Api) -> None:
    answer = await placed.fails(400, "POST", PODS + "/p/exec?container=main&command=ls", Upgrade="SPDY/3.1")
    assert "use kubectl 1.31 or newer" in answer["message"]
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await placed.session.ws_connect(f"http://api{PODS}/p/exec?container=main&command=ls", protocols=("chat",))
    assert caught.value.status == 400


def pod(names: list[str], default: str = "", inits: tuple[str, ...] = ()) -> dict[str, Any]:
    annotations = {"kubectl.kubernetes.io/default-container": default} if default else {}
    spec = {"containers": [{"name": n} for n in names], "initContainers": [{"name": n} for n in inits]}
    return {"metadata": {"name": "p", "annotations": annotations}, "spec": spec}


def test_the_only_or_the_annotated_container_is_meant() -> None:
    assert pick_container(pod(["a"]), "") == "a"
    assert pick_container(pod(["a", "b"], default="b"), "") == "b"
    assert pick_container(pod(["a"], inits=("i",)), "i") == "i"
    with pytest.raises(StatusError, match=r"or one of the init containers: \[i\]"):
        pick_container(pod(["a", "b"], inits=("i",)), "")


def test_a_node_is_reached_by_its_internal_address() -> None:
    addresses = [{"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "2001:db8::1"}]
    assert node_endpoint({"metadata": {"name": "n1"}, "status": {"addresses": addresses}}) == "[2001:db8::1]:10250"
    with pytest.raises(StatusError, match="has no address yet"):
        node_endpoint({"metadata": {"name": "n1"}})
