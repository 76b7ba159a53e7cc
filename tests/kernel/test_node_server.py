"""The node's HTTPS API: logs and exec of real containers."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from podrig import Rig, Watched, make_pod, rig, shell, until

from podwire.model.objects import Pod
from podwire.runtime.execsession import PROTOCOLS
from podwire.runtime.kubelet import KubeletServer

pytestmark = pytest.mark.kernel

TOKEN = "a-token"
STAND_IN = {"name": "web", "image": "nginx", "ports": [{"containerPort": 8080}]}


class Node:
    """A node with its server and a client of it."""

    def __init__(self, shim: Rig, watched: Watched, session: aiohttp.ClientSession) -> None:
        self.shim, self.watched, self.session = shim, watched, session

    async def run(self, *containers: dict[str, Any], **spec: Any) -> Pod:
        pod = make_pod("web", *containers, **spec)
        await self.watched.run(pod)
        return pod

    async def logs(self, container: str = "main", **query: str) -> tuple[int, str]:
        async with self.session.get(f"/containerLogs/shop/web/{container}", params=query) as response:
            return response.status, await response.text()

    def exec(self, command: list[str], *flags: str, protocol: str = PROTOCOLS[0], container: str = "main") -> Any:
        query = [("command", word) for word in command] + [(flag, "true") for flag in flags]
        return self.session.ws_connect(f"/exec/shop/web/{container}", params=query, protocols=(protocol,))


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with contextlib.AsyncExitStack() as stack:
        shim = await stack.enter_async_context(rig(tmp_path))
        watched = shim.node()
        await watched.runtime.connect()
        listener = socket.create_server(("127.0.0.1", 0))
        server = KubeletServer(watched.runtime, TOKEN)
        await server.start(listener, None)
        stack.push_async_callback(server.stop)
        session = aiohttp.ClientSession(
            f"http://127.0.0.1:{listener.getsockname()[1]}", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        await stack.enter_async_context(session)
        yield Node(shim, watched, session)


async def collect(socket: aiohttp.ClientWebSocketResponse) -> dict[int, bytes]:
    """All that comes, by channel."""
    channels: dict[int, bytes] = {}
    async for message in socket:
        channels[message.data[0]] = channels.get(message.data[0], b"") + message.data[1:]
    return channels


def status_of(channels: dict[int, bytes]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(channels[3])
    return document


async def test_needs_the_token(node: Node) -> None:
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        async with node.session.get("/pods", headers=headers) as response:
            assert response.status == 401
    async with node.session.get("/healthz", headers={"Authorization": ""}) as response:
        assert await response.text() == "ok"


async def test_lists_its_pods(node: Node) -> None:
    pod = await node.run(STAND_IN)
    await node.watched.ready(pod)
    async with node.session.get("/pods") as response:
        (item,) = (await response.json())["items"]
    assert item["metadata"] == {"name": "web", "namespace": "shop", "uid": "uid-web"}
    assert item["status"]["phase"] == "Running"


async def test_logs_of_a_container_that_has_ended(node: Node) -> None:
    pod = await node.run(shell("echo one; echo two >&2; echo three"), restartPolicy="Never")
    await node.watched.report(pod, lambda report: report.phase == "Succeeded")
    status, text = await node.logs()
    assert status == 200
    assert sorted(text.split()) == ["one", "three", "two"]
    assert len((await node.logs(tailLines="1"))[1].split()) == 1
    assert (await node.logs(tailLines="1", timestamps="true"))[1][4] == "-"
    assert await node.logs(sinceSeconds="3600", follow="true") == (200, text)
    assert (await node.logs(limitBytes="2"))[1] == text[:2]
    assert (await node.logs(tailLines="many"))[0] == 400


async def test_logs_are_followed_to_the_end(node: Node) -> None:
    pod = await node.run(shell("echo up; read x < /shared/go; echo $x", volumeMounts=[{"name": "v", "mountPath": "/shared"}]),
                         initContainers=[shell("mkfifo /shared/go", "i", volumeMounts=[{"name": "v", "mountPath": "/shared"}])],
                         volumes=[{"name": "v", "emptyDir": {}}], restartPolicy="Never")  # fmt: skip
    await node.watched.report(pod, lambda report: report.phase == "Running")
    async with node.session.get("/containerLogs/shop/web/main", params={"follow": "true"}) as response:
        assert await response.content.readline() == b"up\n"
        fifo = node.shim.root / "node-1/pods/uid-web/volumes/v/go"
        await asyncio.to_thread(fifo.write_text, "down\n")
        assert await response.content.read() == b"down\n"


async def test_logs_that_are_not_there_are_explained(node: Node) -> None:
    await node.run(shell("sleep 1000"), initContainers=[shell("sleep 1000", "init")])
    status, text = await node.logs("main")
    assert (status, json.loads(text)["message"]) == (
        400,
        'container "main" in pod "web" is waiting to start: PodInitializing',
    )
    status, text = await node.logs("init", previous="true")
    assert (status, json.loads(text)["message"]) == (
        400,
        'previous terminated container "init" in pod "web" not found',
    )
    assert json.loads((await node.logs("none"))[1])["message"] == 'container "none" is not valid for pod "web"'
    async with node.session.get("/containerLogs/shop/other/main") as response:
        assert response.status == 404


async def test_the_log_of_the_run_before(node: Node) -> None:
    pod = await node.run(shell("echo run; exit 1"))
    await node.watched.report(pod, lambda report: report.container_statuses[0]["restartCount"] == 1)
    assert await node.logs(previous="true") == (200, "run\n")


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_exec_gives_output_errors_and_the_exit_code(node: Node, protocol: str) -> None:
    pod = await node.run(shell("sleep 1000"))
    await node.watched.ready(pod)
    async with node.exec(["sh", "-c", "echo out; echo err >&2; exit 3"], "stdout", "stderr", protocol=protocol) as ws:
        assert ws.protocol == protocol
        channels = await collect(ws)
    assert (channels[1], channels[2]) == (b"out\n", b"err\n")
    status = status_of(channels)
    assert (status["status"], status["reason"]) == ("Failure", "NonZeroExitCode")
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "3"}]


async def test_exec_in_a_stand_in(node: Node) -> None:
    pod = await node.run(STAND_IN)
    await node.watched.ready(pod)
    async with node.exec(["hostname"], "stdout", container="web") as ws:
        channels = await collect(ws)
    assert channels[1] == b"web\n"
    assert status_of(channels) == {"metadata": {}, "status": "Success"}


async def test_exec_feeds_stdin_until_it_is_closed(node: Node) -> None:
    pod = await node.run(shell("sleep 1000"))
    await node.watched.ready(pod)
    data = bytes(range(256)) * 2000
    async with node.exec(["cat"], "stdin", "stdout") as ws:
        receiving = asyncio.create_task(collect(ws))
        for start in range(0, len(data), 30000):
            await ws.send_bytes(b"\0" + data[start : start + 30000])
        await ws.send_bytes(bytes([255, 0]))
        channels = await receiving
    assert channels[1] == data
    assert status_of(channels)["status"] == "Success"


async def test_exec_on_a_terminal(node: Node) -> None:
    pod = await node.run(shell("sleep 1000"))
    await node.watched.ready(pod)
    async with node.exec(["sh"], "stdin", "stdout", "tty") as ws:
        receiving = asyncio.create_task(collect(ws))
        await ws.send_bytes(b"\4" + json.dumps({"Width": 123, "Height": 45}).encode())
        await ws.send_bytes(b"\0stty size; test -t 0 && echo terminal-$((1+1)); exit 5\n")
        channels = await receiving
    assert b"45 123\r\n" in channels[1]
    assert b"terminal-2\r\n" in channels[1]
    assert status_of(channels)["details"]["causes"][0]["message"] == "5"


async def test_exec_of_something_that_does_not_exist(node: Node) -> None:
    pod = await node.run(shell("sleep 1000"))
    await node.watched.ready(pod)
    async with node.exec(["no-such"], "stdout") as ws:
        channels = await collect(ws)
    assert 'exec: "no-such": executable file not found in $PATH' in status_of(channels)["message"]
    async with node.session.get("/exec/shop/web/main", params={"stdout": "true"}) as response:
        assert response.status == 400
    async with node.session.get("/exec/shop/web/main", params={"stdout": "true", "command": "true"}) as response:
        assert response.status == 426  # nothing but the WebSocket is missing


async def test_a_client_that_goes_takes_its_process_along(node: Node) -> None:
    pod = await node.run(shell("exec sleep 1000"))
    await node.watched.ready(pod)
    record = node.watched.runtime.run_of("shop", "web", "main")
    assert record is not None

    def processes() -> int:
        """In the container's PID namespace."""
        own = Path(f"/proc/{record.pid}/ns/pid").stat().st_ino
        count = 0
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                count += entry.name.isdigit() and (entry / "ns/pid").stat().st_ino == own
        return count

    ws = await node.exec(["sleep", "1000"], "stdout")
    await ws.receive()  # it runs
    assert processes() == 2
    await ws.close()
    await until(lambda: processes() == 1)
