"""Stand-ins over real sockets on loopback."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from podwire.runtime.shim.messages import StandInPort
from podwire.runtime.shim.standin import Identity, StandIn, open_sockets

IDENTITY = Identity("web-1", "shop", "node-1", "web")


class Served:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.stand_in = StandIn(IDENTITY, self.log.append)
        self.tcp = self.udp = 0

    async def ask(self, *pieces: bytes) -> bytes:
        """Send the pieces one by one and read to the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.tcp)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    sockets = open_sockets((StandInPort("TCP", 0), StandInPort("UDP", 0), StandInPort("SCTP", 1)))
    served.tcp, served.udp = (sock.getsockname()[1] for sock in sockets)
    await served.stand_in.serve(sockets)
    yield served
    served.stand_in.close()
    await asyncio.sleep(0)


async def test_http_gets_the_pods_name_first(served: Served) -> None:
    answer = await served.ask(b"GET / HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body.splitlines()[0] == b"web-1"
    assert b"node: node-1\n" in body
    assert b"client: 127.0.0.1:" in body
    assert served.log == [f'127.0.0.1 - "GET / HTTP/1.0" 200 {len(body)}']


async def test_json_for_machines(served: Served) -> None:
    body = (await served.ask(b"GET /json?x=1 HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")[2]
    facts = json.loads(body)
    assert (facts["pod"], facts["namespace"], facts["node"]) == ("web-1", "shop", "node-1")
    assert facts["server"] == f"127.0.0.1:{served.tcp}"


async def test_a_head_has_no_body(served: Served) -> None:
    assert (await served.ask(b"HEAD / HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "pieces",
    [
        (b"GET /hostname HTTP/1.1\r\n\r\n", b"GET /hostname HTTP/1.0\r\n\r\n"),
        (b"G", b"ET /hostname HTTP/1.1\r\nHo", b"st: x\r\n\r\nGET /hostname HTTP/1.0\r\n\r", b"\n"),
        (b"POST /hostname HTTP/1.1\r\nContent-Length: 5\r\n\r\nhe", b"lloGET /hostname HTTP/1.0\r\n\r\n"),
        (
            b"POST /hostname HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            b"2;x=y\r\nde\r\n0\r\nTrailer: 1\r\n\r\nGET /hostname HTTP/1.1\r\nConnection: close\r\n\r\n",
        ),
    ],
)
async def test_connections_are_kept_alive_however_the_bytes_arrive(served: Served, pieces: tuple[bytes, ...]) -> None:
    answer = await served.ask(*pieces)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.endswith(b"web-1")


async def test_other_tcp_gets_the_name_and_an_echo(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.tcp)
    writer.write(b"\x00\x01hello")
    assert await reader.readexactly(13) == b"web-1\n\x00\x01hello"
    writer.write(b"again")
    assert await reader.readexactly(5) == b"again"
    writer.close()
    await writer.wait_closed()


async def test_a_silent_client_is_spoken_to(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.tcp)
    assert await reader.readline() == b"web-1\n"
    writer.close()
    await writer.wait_closed()


async def test_udp_gets_the_name_and_an_echo_in_one(served: Served) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", served.udp))
        await loop.sock_sendall(sock, b"ping")
        assert await loop.sock_recv(sock, 100) == b"web-1\nping"


async def test_a_port_that_is_taken_is_named(served: Served) -> None:
    with pytest.raises(OSError, match=f"port {served.tcp}/TCP: Address already in use"):
        open_sockets((StandInPort("UDP", 0), StandInPort("TCP", served.tcp)))


async def test_draining_answers_what_is_open_and_then_ends(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.tcp)
    writer.write(b"GET /hostname HTTP/1.1\r\n\r\nGET /hostname HTTP/1.1\r\n")
    assert b"Connection: keep-alive" in await reader.readuntil(b"web-1")
    ended = asyncio.Event()
    served.stand_in.drain(ended.set)
    assert await served.ask(b"GET /hostname HTTP/1.1\r\n\r\n")  # still taken: the network may not know yet
    writer.write(b"\r\n")
    answer = await reader.read()
    assert b"Connection: close" in answer
    assert answer.endswith(b"web-1")
    writer.close()
    await writer.wait_closed()
    await ended.wait()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", served.tcp)
