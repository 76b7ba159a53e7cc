"""Running single probes and hooks: HTTP and TCP from the node's network namespace, commands in the container."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Sequence

from podwire.model.objects import Container, HttpGet, Probe, TcpSocket
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.probes import ProbeResult, port_number
from podwire.runtime.shim.messages import ContainerRecord
from podwire.runtime.shimclient import ShimClient

_MAX_OUTPUT = 10240


class Prober:
    """Probes the containers of one pod, which is reached at `address`."""

    def __init__(self, client: ShimClient, address: str) -> None:
        self._client, self._address = client, address

    async def probe(self, container: Container, probe: Probe, record: ContainerRecord) -> ProbeResult:
        """One attempt, no longer than the probe's timeout; failures of any kind are results, not errors."""
        timeout = max(1, probe.timeout_seconds)
        try:
            async with asyncio.timeout(timeout):
                if probe.http_get is not None:
                    plain = record.stand_in  # a stand-in has no certificate
                    return await self.http_get(container, probe.http_get, plain=plain)
                if probe.tcp_socket is not None:
                    return await self._tcp(container, probe.tcp_socket)
                if probe.exec is not None and not record.stand_in:  # its image's programs are not here
                    code, output = await run_command(self._client, record, probe.exec.command)
                    return ProbeResult(code == 0, output.decode("utf-8", "replace"))
        except TimeoutError:
            return ProbeResult(False, f"timed out after {timeout} s")
        except (OSError, ValueError, RuntimeFailure) as error:
            return ProbeResult(False, str(error))
        return ProbeResult(True)

    async def http_get(self, container: Container, get: HttpGet, *, plain: bool = False) -> ProbeResult:
        """Success is a status of 200 to 399; `plain`: without TLS, whatever the scheme.

        Raises OSError or ValueError where there is no answer at all."""
        host = get.host or self._address
        port = port_number(get.port, container)
        sock = await self._connect(host, port)
        context = None
        if get.scheme.upper() == "HTTPS" and not plain:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # as kubelet: it is reached, not trusted
        reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname=host if context else None)
        try:
            writer.write(_request(get, host, port))
            status_line = await reader.readline()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        words = status_line.split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
            return ProbeResult(False, f"{host}:{port} did not answer in HTTP")
        status = int(words[1])
        if 200 <= status < 400:
            return ProbeResult(True)
        return ProbeResult(False, f"HTTP probe failed with statuscode: {status}")

    async def _tcp(self, container: Container, target: TcpSocket) -> ProbeResult:
        (await self._connect(target.host or self._address, port_number(target.port, container))).close()
        return ProbeResult(True)

    async def _connect(self, host: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = await self._client.open_socket(family, socket.SOCK_STREAM)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise ConnectionError(f"dial tcp {host}:{port}: {reason}") from error
            raise
        return sock


def _request(get: HttpGet, host: str, port: int) -> bytes:
    given = {str(header.get("name", "")): str(header.get("value", "")) for header in get.http_headers}
    names = {name.lower() for name in given}
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    defaults = {"Host": authority, "User-Agent": "kube-probe/podwire", "Accept": "*/*", "Connection": "close"}
    headers = {name: value for name, value in defaults.items() if name.lower() not in names} | given
    path = get.path if get.path.startswith("/") else f"/{get.path}"
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1", "replace")


async def run_command(client: ShimClient, record: ContainerRecord, command: Sequence[str]) -> tuple[int, bytes]:
    """Run a command in a container to its end; its exit code, and stdout and stderr together (the first 10 KB).

    If cancelled, the command is killed. Raises RuntimeFailure if it cannot be started."""
    loop = asyncio.get_running_loop()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", 0))
    try:
        try:
            process = await client.exec(record, command, (null, writing, writing))
        finally:
            os.close(null)
            os.close(writing)
        try:
            output = bytearray()
            while data := await reader.read(65536):
                output += data[: _MAX_OUTPUT - len(output)]
            return await process.wait(), bytes(output)
        except asyncio.CancelledError:
            await process.kill()
            await process.wait()
            raise
    finally:
        transport.close()
