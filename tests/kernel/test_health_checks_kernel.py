"""Health-check node ports as the case files have them: what a balancer hears that asks a node, over real sockets."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain

import msgspec
import pytest
from service_cases import FACTS, feed
from service_histories import Addresses, Interview, Listens, Question, load_interviews

from podwire.agent.healthchecks import HealthCheckPorts
from podwire.agent.rounds import OnRound, Round, Served
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family, IPAddress
from podwire.model.ids import ObjectKey
from podwire.model.kernelstate import Address, Device, Link
from podwire.model.meta import ObjectMeta
from podwire.model.objects import EndpointSlice, Node, NodeAddress, NodeStatus, Pod, Service
from podwire.model.ops import AddAddress, ChangeLink, DelAddress
from podwire.model.proxyconfig import parse_proxy_config
from podwire.model.servicetable import NodeFacts
from podwire.plan.proxyfacts import listening_places
from podwire.plan.services_table import service_table

pytestmark = [pytest.mark.kernel, pytest.mark.needs("IPv6")]

INTERVIEWS = list(load_interviews())
LOCAL = {
    "name": "web", "type": "LoadBalancer", "clusterIP": "10.96.0.10", "externalTrafficPolicy": "Local",
    "healthCheckNodePort": 32000, "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}],
}  # fmt: skip
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


async def ask(netns: int, address: str, port: int) -> tuple[int, dict[str, str], bytes]:
    """HTTP by hand, as balancers do it: (status, headers, body); status 0: refused."""

    def connected() -> socket.socket:
        return socket.create_connection((address, port), timeout=5)

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
    status, headers, body = await ask(netns, question.at or LOCALHOST[family], question.port)
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
                case Addresses():
                    await renumber(linux_kernel, netns, step)
                    await follow(ports, linux_kernel, interview)
                case Listens():
                    await until(lambda: frozenset(chain.from_iterable(ports.listening.values())), step.at)
                case objects:
                    for item in objects:
                        feed(programmer, item, interview.family)
                    wanted = {port: key for key, port in programmer.ports.items() if port}
                    await until(lambda: ports.ports, wanted)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_an_address_whose_port_is_taken_keeps_no_other_from_answering(linux_kernel: LinuxKernel, netns: int) -> None:
    applied = await linux_kernel.apply((ChangeLink(Link("lo", Device(), up=True)),))
    assert applied.ok, applied.failures
    programmer = Programmer(FACTS)
    ports = HealthCheckPorts(programmer, linux_kernel, lambda: True)
    free, taken = ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("127.0.0.2")
    ports.set_places({Family.IPV4: frozenset((free, taken)), Family.IPV6: frozenset()})
    running = asyncio.create_task(ports.run())
    try:
        with run_in_netns(netns, lambda: socket.create_server((str(taken), 32000))):
            feed(programmer, {"service": LOCAL, "endpoints": []}, Family.IPV4)
            await until(lambda: ports.listening, {32000: {free}})
            assert (await ask(netns, str(free), 32000))[0] == 503
        feed(programmer, {"service": LOCAL, "endpoints": [{"ip": "10.244.1.2", "node": "n1"}]}, Family.IPV4)
        await until(lambda: ports.listening, {32000: {free, taken}})
        assert (await ask(netns, str(taken), 32000))[0] == 200
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def until(found: Callable[[], object], wanted: object) -> None:
    try:
        async with asyncio.timeout(5):
            while found() != wanted:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.005)
    except TimeoutError:
        assert found() == wanted


async def renumber(kernel: LinuxKernel, netns: int, wanted: Addresses) -> None:
    """On `lo`, where no address waits for duplicate detection; IPv6 ones have their routes a moment later all the same."""
    held = {address for address in (await kernel.observe()).addresses if not address.interface.ip.is_loopback}
    stay = {Address("lo", ipaddress.ip_interface(text)) for text in wanted.texts}
    applied = await kernel.apply((*map(DelAddress, held - stay), *map(AddAddress, stay - held)))
    assert applied.ok, applied.failures
    for address in stay:
        refused = partial(refuses, address.interface.ip)
        await until(partial(run_in_netns, netns, refused), True)


def refuses(ip: IPAddress) -> bool:
    with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6) as sock:
        sock.settimeout(0.02)
        return sock.connect_ex((str(ip), 9)) == errno.ECONNREFUSED


async def follow(ports: HealthCheckPorts, kernel: LinuxKernel, interview: Interview) -> None:
    """What a proxy does when addresses change."""
    status = NodeStatus(addresses=tuple(NodeAddress("InternalIP", str(ip)) for ip in interview.facts.node_ips))
    node = Node(metadata=ObjectMeta(name=interview.facts.name), status=status)
    assert interview.config is not None
    config, _ = parse_proxy_config(interview.config, interview.name)
    ports.set_places(listening_places(config, node, await kernel.observe()))
