"""The real kubectl on every kind: what it sends is taken, what it prints is what Kubernetes has it print."""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.store.memory import MemoryStore

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
pytestmark = [
    pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed"),
    pytest.mark.timeout(120),
]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Kubectl:
    """Runs kubectl against one server; its discovery cache is its own."""

    url: str
    home: Path

    async def run(self, line: str, stdin: str | Any = "") -> Ran:
        text = stdin if isinstance(stdin, str) else yaml.safe_dump(stdin)
        assert KUBECTL is not None
        process = await asyncio.create_subprocess_exec(
            KUBECTL,
            f"--server={self.url}",
            f"--cache-dir={self.home}/cache",
            *line.split(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"HOME": str(self.home), "PATH": os.defpath},
        )
        out, err = await process.communicate(text.encode())
        return Ran(process.returncode or 0, out.decode(), err.decode())

    async def __call__(self, line: str, stdin: str | Any = "") -> str:
        """Standard output of a command that must succeed."""
        ran = await self.run(line, stdin)
        assert ran.code == 0, f"kubectl {line}: {ran.out}{ran.err}"
        return ran.out

    async def fails(self, line: str, stdin: str | Any = "") -> str:
        """Standard error of a command that must fail."""
        ran = await self.run(line, stdin)
        assert ran.code != 0, f"kubectl {line} succeeded: {ran.out}"
        return ran.err

    async def get(self, what: str) -> Any:
        return json.loads(await self(f"get {what} -o json"))


@pytest.fixture
async def kubectl(tmp_path: Path) -> AsyncIterator[Kubectl]:
    store = MemoryStore()
    config = ServerConfig(service_cidrs=(ip_network("10.96.0.0/12"), ip_network("fd00:10:96::/112")))
    server = ApiServer(create_app(store, config))
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    await server.start([Listener(sock)])
    yield Kubectl(url, tmp_path)
    await server.stop()
    await store.close()
