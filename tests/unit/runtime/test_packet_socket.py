import asyncio
import os
import socket
from typing import Any

import pytest

from podwire.runtime.shim.packets import MAX_PACKET, PacketSocket


class End:
    """One end that keeps what it gets."""

    def __init__(self, sock: socket.socket) -> None:
        self.got: list[tuple[dict[str, Any], list[int]]] = []
        self.closed = 0
        self.news = asyncio.Event()
        self.packets = PacketSocket(sock, self._take, self._close)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        self.got.append((message, fds))
        self.news.set()

    def _close(self) -> None:
        self.closed += 1
        self.news.set()


def pair() -> tuple[End, End]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return End(left), End(right)


async def until(end: End, count: int) -> None:
    async with asyncio.timeout(10):
        while len(end.got) < count:
            end.news.clear()
            await end.news.wait()


async def test_messages_keep_their_bounds_and_order_also_when_the_peer_is_slow() -> None:
    left, right = pair()
    sent = [{"n": number, "text": "x" * (number % 7) * 1000} for number in range(2000)]
    for message in sent:
        left.packets.send(message)
    await until(right, len(sent))
    assert [message for message, _ in right.got] == sent
    left.packets.close()
    right.packets.close()


async def test_descriptors_go_with_their_message_and_stay_the_senders() -> None:
    left, right = pair()
    reading, writing = os.pipe()
    for number in range(400):  # enough that some have to wait
        left.packets.send({"n": number, "text": "x" * 2000}, [writing] if number % 100 == 99 else ())
    os.close(writing)
    await until(right, 400)
    fds = [fds for _, fds in right.got if fds]
    assert [len(some) for some in fds] == [1] * 4
    for (fd,) in fds:
        assert not os.get_inheritable(fd)
        os.write(fd, b"x")
        os.close(fd)
    assert os.read(reading, 10) == b"xxxx"
    os.close(reading)
    left.packets.close()
    right.packets.close()


async def test_the_end_of_the_peer_is_told_once() -> None:
    left, right = pair()
    left.packets.close()
    async with asyncio.timeout(10):
        await right.news.wait()
    right.packets.send({"nobody": "hears"})
    right.packets.close()
    assert (left.closed, right.closed) == (0, 1)


async def test_what_no_packet_can_hold_is_refused() -> None:
    left, right = pair()
    with pytest.raises(ValueError, match="too large for the shim"):
        left.packets.send({"text": "x" * MAX_PACKET})
    left.packets.close()
    right.packets.close()
