"""Health-check node ports as the case files have them: what a balancer hears that asks a node, over real sockets."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import pytest
from service_cases import feed
from service_histories import Interview, Question, load_interviews

from podwire.agent.healthchecks import HealthCheckPorts
from podwire.agent.rounds import OnRound, Round, Served
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.kernelstate import Device, Link
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.ops import ChangeLink
from podwire.model.servicetable import NodeFacts
from podwire.plan.services_table import service_table

pytestmark = [pytest.mark.kernel, pytest.mark.needs("IPv6")]

INTERVIEWS = list(load_interviews())
LOCALHOST = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}


class Programmer:
    """Tells of each Service that it is fed as if it had reached the kernel."""

    def __init__(self, facts: NodeFacts) -> None:
        self._facts = facts
        self._observers: list[OnRound] = []
        self.ports: dict[ObjectKey, int] = {}

    def subscribe(self, observer: OnRound) -> None:
        self._observers.append(observer)

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        table = service_table(service, slices, self._facts)
        self.ports[key] = table.health_check_port
        done = Round(changed={key: Served(service, tuple(slices), table)}, full=False, seconds=0.0, queued=0.0)
        for observer in self._observers:
            observer(done)

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        raise AssertionError("no host port has a health check")


async def ask(netns: int, family: Family, port: int) -> tuple[int, dict[str, str], bytes]:
    """HTTP by hand, as balancers do it: (status, headers, body); status 0: refused."""

    def connected() -> socket.socket:
        return socket.create_connection((LOCALHOST[family], port), timeout=5)

    try:
        sock = run_in_netns(netns, connected)
    except ConnectionRefusedError:
        return 0, {}, b""
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b"GET /healthz HTTP/1.0\r\nHost: node\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


async def answered(netns: int, family: Family, question: Question) -> None:
    status, headers, body = await ask(netns, family, question.port)
    assert status == question.status
    if not question.status:
        return
    namespace, name = question.service.split("/")
    assert msgspec.json.decode(body) == {
        "service": {"namespace": namespace, "name": name},
        "localEndpoints": question.endpoints,
        "serviceProxyHealthy": question.healthy,
    }
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-load-balancing-endpoint-weight"] == str(question.endpoints)


@pytest.mark.parametrize("interview", INTERVIEWS, ids=lambda interview: interview.name)
async def test_balancers_are_told_what_the_case_says(linux_kernel: LinuxKernel, netns: int, interview: Interview) -> None:
    applied = await linux_kernel.apply((ChangeLink(Link("lo", Device(), up=True)),))
    assert applied.ok, applied.failures
    programmer, well = Programmer(interview.facts), True
    ports = HealthCheckPorts(programmer, linux_kernel, lambda: well)
    running = asyncio.create_task(ports.run())
    try:
        for step in interview.steps:
            match step:
                case bool():
                    well = step
                case Question():
                    await answered(netns, interview.family, step)
                case objects:
                    for item in objects:
                        feed(programmer, item, interview.family)
                    wanted = {port: key for key, port in programmer.ports.items() if port}
                    async with asyncio.timeout(5):
                        while ports.ports != wanted:  # noqa: ASYNC110 - nothing tells
                            await asyncio.sleep(0.005)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
