"""Sockets to servers notice that the other end is gone."""

import socket

from podwire.client.sockets import GONE_SECONDS, open_socket


def test_the_kernel_asks_a_silent_server_and_gives_up_on_a_deaf_one() -> None:
    with open_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 443))) as sock:
        assert sock.type == socket.SOCK_STREAM
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < GONE_SECONDS
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == GONE_SECONDS * 1000
