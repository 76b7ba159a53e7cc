"""`podwire paths`: send a real packet along each path of a running cluster and report how it went.

Each probe carries a nonce. Captures in every namespace on the way keep the frames that hold it, also inside a tunnel, so
the hops are what the devices saw. Where addresses changed, the node's conntrack is asked for its record.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import msgspec

from podwire.client.api import ApiClient
from podwire.kernel.capture import Capture
from podwire.kernel.conntrack import lookup
from podwire.kernel.netns import in_netns
from podwire.lab.hops import Hop, hops_from, objection
from podwire.lab.probes import Probe, Snapshot, choose_probes, place_of, probes_between
from podwire.model.objects import EndpointSlice, Node, Pod, Service
from podwire.model.resources import ENDPOINTSLICES, NODES, PODS, SERVICES, Resource
from podwire.wire.packet import endpoint

T = TypeVar("T")

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 3.0
_TCP_INFO_RTT = 68
"""Offset of tcpi_rtt (microseconds) in struct tcp_info (linux/tcp.h)."""


@dataclass(frozen=True, slots=True)
class PathResult:
    """What became of a probe. `rtt_ms` is the kernel's own measure for TCP (tcpi_rtt), request → answer for UDP."""

    probe: Probe
    hops: tuple[Hop, ...] = ()
    rtt_ms: float | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


class Site(Protocol):
    """A cluster whose namespaces this process can enter: a lab."""

    @property
    def client(self) -> ApiClient: ...

    async def open_namespaces(self, pods: Iterable[Pod]) -> dict[str, int]:
        """Descriptors, the caller's to close, by place: `world`, `balancer`, every node by name, and those of `pods` that
        have a network of their own as `namespace/name`."""
        ...


async def probe_paths(site: Site, source: str = "", target: str = "") -> list[PathResult]:
    """Probe all paths, or those from `source` to `target` (see `probes_between`, which may raise InvalidInput)."""
    snapshot = await take_snapshot(site.client)
    probes = probes_between(snapshot, source, target) if source or target else choose_probes(snapshot)
    places = {place for probe in probes for place in (probe.origin, *probe.ends_at)}
    pods = [pod for pod in snapshot.pods if place_of(pod) in places and not pod.spec.host_network]
    async with _namespaces(site, pods) as namespaces, Capture() as capture:
        await capture.open(namespaces)
        return [await run_probe(probe, namespaces, capture) for probe in probes]


async def take_snapshot(client: ApiClient) -> Snapshot:
    """The objects that the choice of probes depends on."""
    nodes, pods, services, slices = await asyncio.gather(
        _typed(client, NODES, Node),
        _typed(client, PODS, Pod),
        _typed(client, SERVICES, Service),
        _typed(client, ENDPOINTSLICES, EndpointSlice),
    )
    return Snapshot(nodes, pods, services, slices)


async def _typed(client: ApiClient, resource: Resource, kind: type[T]) -> tuple[T, ...]:
    listed = await client.list(resource)
    return tuple(msgspec.convert(item, kind) for item in listed.items)


@contextlib.asynccontextmanager
async def _namespaces(site: Site, pods: Sequence[Pod]) -> AsyncIterator[Mapping[str, int]]:
    namespaces = await site.open_namespaces(pods)
    try:
        yield namespaces
    finally:
        for fd in namespaces.values():
            os.close(fd)


async def run_probe(probe: Probe, namespaces: Mapping[str, int], capture: Capture, mark: bytes = b"") -> PathResult:
    """Send one probe and watch it with `capture`, open in `namespaces`. Whatever goes wrong on the way is the result.

    mark: ASCII that the capture was told to expect; probes that share one may be under way at once. Without, each has the
    capture for itself."""
    if probe.origin not in namespaces:
        return PathResult(probe, reason=f"{probe.origin} is gone")
    nonce = mark + new_mark()
    if not mark:
        capture.expect(nonce)
    rtt_ms, reason = await _exchange(probe, namespaces[probe.origin], _request(probe, nonce))
    hops = hops_from([frame for frame in capture.collect() if nonce in frame.data])
    hops = [await _with_conntrack(hop, previous, namespaces) for previous, hop in zip([None, *hops], hops, strict=False)]
    return PathResult(probe, tuple(hops), rtt_ms, reason or objection(probe, hops))


def new_mark() -> bytes:
    """16 ASCII characters that no other packet has."""
    return secrets.token_hex(8).encode()


async def _exchange(probe: Probe, netns: int, request: bytes) -> tuple[float | None, str]:
    """(round trip in ms or None, reason it failed or ""). The socket is made in the sender's namespace."""
    family = socket.AF_INET if probe.address.version == 4 else socket.AF_INET6
    kind = socket.SOCK_DGRAM if probe.protocol == "UDP" else socket.SOCK_STREAM
    sock = await in_netns(netns, lambda: socket.socket(family, kind | socket.SOCK_NONBLOCK))
    where = endpoint(probe.address, probe.port)
    with sock:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await loop.sock_connect(sock, (str(probe.address), probe.port))
        except TimeoutError:
            return None, f"no connection to {where} within {CONNECT_SECONDS:g} s"
        except OSError as error:
            # asyncio puts words of its own in place of the system's.
            return None, f"no connection to {where}: {os.strerror(error.errno) if error.errno else error}"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                started = time.perf_counter()
                await loop.sock_sendall(sock, request)
                answer = await loop.sock_recv(sock, 4096)
                elapsed = time.perf_counter() - started
        except TimeoutError:
            return None, f"no answer from {where} within {ANSWER_SECONDS:g} s"
        except OSError as error:
            return None, f"no answer from {where}: {error.strerror or error}"
        if not answer:
            return None, f"{where} closed the connection without an answer"
        return round(elapsed * 1000 if probe.protocol == "UDP" else _kernel_rtt(sock), 3), ""


def _request(probe: Probe, nonce: bytes) -> bytes:
    if probe.protocol == "UDP":
        return b"podwire probe " + nonce + b"\n"
    host = endpoint(probe.address, probe.port).encode()
    return b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nX-Podwire-Probe: " + nonce + b"\r\nConnection: close\r\n\r\n"


def _kernel_rtt(sock: socket.socket) -> float:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return float(struct.unpack_from("=I", info, _TCP_INFO_RTT)[0]) / 1000


async def _with_conntrack(hop: Hop, previous: Hop | None, namespaces: Mapping[str, int]) -> Hop:
    """The hop with the kernel's record of the translation, asked where it happened."""
    if not hop.rewritten or previous is None:
        return hop
    record = await lookup(namespaces[hop.place], previous.packet)
    return replace(hop, conntrack=record) if record else hop
