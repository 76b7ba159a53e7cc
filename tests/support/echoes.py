"""Servers in a network namespace that say who called and give back what they were sent, and their clients."""

import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family, IPAddress

_TRANSFER = 300_000


def socket_family(address: IPAddress) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


@contextmanager
def tcp_echo(netns: int, address: IPAddress, port: int = 8080) -> Iterator[None]:
    """Answers a connection with the client's address and then all that it sends."""
    server = run_in_netns(netns, lambda: socket.socket(socket_family(address), socket.SOCK_STREAM))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((str(address), port))
    server.listen(64)

    def serve() -> None:
        while True:
            try:
                connection, peer = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(f"{peer[0]}\n".encode())
                while data := connection.recv(65536):
                    connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def tcp_call(netns: int, target: IPAddress, port: int = 8080, size: int = _TRANSFER, timeout: float = 20.0) -> str:
    """Sends `size` bytes and has them back; returns the client's address as the server saw it. Raises OSError."""
    payload = bytes(range(256)) * (size // 256)
    with run_in_netns(netns, lambda: socket.socket(socket_family(target), socket.SOCK_STREAM)) as client:
        client.settimeout(timeout)
        client.connect((str(target), port))

        def send() -> None:
            client.sendall(payload)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        answer = b""
        while data := client.recv(1 << 18):
            answer += data
        sender.join(timeout)
    seen, _, rest = answer.partition(b"\n")
    assert rest == payload
    return seen.decode()


def echo_server(netns: int, family: Family, port: int = 8080) -> AbstractContextManager[None]:
    """`tcp_echo` on all addresses of the family."""
    return tcp_echo(netns, ipaddress.ip_address("0.0.0.0" if family is Family.IPV4 else "::"), port)
