"""kill -9 of an API server while clients write: what it acknowledged is there, and no address was given twice."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from podwire.client.api import ApiClient
from podwire.client.errors import Unavailable
from podwire.model.resources import CONFIGMAPS, NAMESPACES, SERVICES

SERVER = """
import asyncio, os, socket, sys
from pathlib import Path
from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.store.sqlite import SqliteStore

async def main():
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(sys.argv[2])
    listening.listen(64)
    server = ApiServer(create_app(SqliteStore.open(Path(sys.argv[1])), ServerConfig()))
    await server.start([Listener(listening)])
    os.write(1, b"ready\\n")
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Server:
    """An API server in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.starts = 0
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> ApiClient:
        self.starts += 1
        path = self.home / f"socket-{self.starts}"
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVER, str(self.home / "store.db"), str(path), stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert await asyncio.wait_for(self.process.stdout.readline(), 20) == b"ready\n"
        return ApiClient("http://api", unix_socket=str(path))

    async def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await self.process.communicate()


class Told:
    """What the server has acknowledged, by name."""

    def __init__(self) -> None:
        self.documents: dict[str, Any] = {}
        self._more = asyncio.Event()

    def note(self, name: str, document: Any) -> None:
        self.documents[name] = document
        self._more.set()

    async def reaches(self, count: int) -> None:
        while len(self.documents) < count:
            self._more.clear()
            await asyncio.wait_for(self._more.wait(), 20)


async def write_until_it_dies(client: ApiClient, writer: str, told: Told) -> None:
    """Create Services and change one object as fast as it goes; note what was acknowledged."""
    number = 0
    while True:
        name = f"{writer}-{number}"
        service = {"metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [{"port": 80}]}}
        try:
            told.note(name, await client.create(SERVICES, service, "default"))
            counter = {"metadata": {"name": writer, "namespace": "default"}, "data": {"n": str(number)}}
            told.note(writer, await (client.replace if number else client.create)(CONFIGMAPS, counter))
        except Unavailable:
            return
        number += 1


@pytest.mark.timeout(60)
async def test_what_was_acknowledged_survives(tmp_path: Path) -> None:
    server, told = Server(tmp_path), Told()
    for round_ in range(4):
        client = await server.start()
        async with client:
            writers = [asyncio.create_task(write_until_it_dies(client, f"w{round_}-{n}", told)) for n in range(6)]
            # In the midst of it: when some, and not always as many, have been acknowledged.
            await told.reaches(len(told.documents) + 20 + 13 * round_)
            await server.kill()
            await asyncio.gather(*writers)
    async with await server.start() as client:
        services = {item["metadata"]["name"]: item for item in (await client.list(SERVICES, "default")).items}
        counters = {item["metadata"]["name"]: item for item in (await client.list(CONFIGMAPS, "default")).items}
        for name, document in told.documents.items():
            if document["kind"] == "Service":
                assert services[name] == document
            else:
                assert int(counters[name]["data"]["n"]) >= int(document["data"]["n"])
        everything = services.values()
        addresses = [service["spec"]["clusterIP"] for service in everything]
        ports = [service["spec"]["ports"][0].get("nodePort") for service in everything if service["spec"]["type"] == "NodePort"]
        assert len(set(addresses)) == len(addresses)
        assert len(set(ports)) == len(ports)
        assert {n["metadata"]["name"] for n in (await client.list(NAMESPACES)).items} >= {"default", "kube-system"}
    await server.kill()
