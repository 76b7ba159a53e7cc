"""`podwire proxy` beside an API server with bad days: whatever it answers in between, the rules are right in the end."""

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from faultyserver import EXPIRED, Faults, Refusal, events
from labcommand import PODWIRE
from rbacrig import rights_of
from servicerig import FACTS, ServiceRig, service_rig

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.pki import kubeconfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.kernel.netns import run_in_netns
from podwire.kernel.syscalls import CLONE_NEWNET, setns
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES
from podwire.store.memory import MemoryStore

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.timeout(60),
    pytest.mark.asyncio(loop_scope="module"),
]

PODS = {"p2": "10.244.1.2", "p3": "10.244.1.3", "far": "10.244.2.2"}
CLIENT = "p4"


class Site:
    """A node with `podwire proxy` on it. Services have the addresses 10.96.0.10 and on, in the order in which they are made."""

    def __init__(self, rig: ServiceRig, client: ApiClient, faults: Faults, token: Path) -> None:
        self.rig, self.client, self.faults, self.token = rig, client, faults, token
        self._last = 9

    async def service(self, name: str, pod: str) -> str:
        """A new one that leads to `pod`; its address."""
        self._last += 1
        address, meta = f"10.96.0.{self._last}", {"name": name, "namespace": "default"}
        await self.client.create(SERVICES, {"metadata": meta, "spec": {"clusterIP": address, "ports": [{"port": 80}]}})
        piece = {
            "metadata": meta | {"labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [PODS[pod]]}],
            "ports": [{"port": 8080}],
        }
        await self.client.create(ENDPOINTSLICES, piece)
        return address

    async def move(self, name: str, pod: str) -> None:
        await self.client.patch(ENDPOINTSLICES, name, {"endpoints": [{"addresses": [PODS[pod]]}]}, "default")

    async def delete(self, name: str) -> None:
        for resource in (SERVICES, ENDPOINTSLICES):
            await self.client.delete(resource, name, "default")

    async def leads(self, address: str, pod: str | None) -> None:
        """Returns once the Service's address leads to `pod`, or (None) to nobody."""
        async with asyncio.timeout(15):
            while await self._who(address) != pod:  # noqa: ASYNC110 - another process does it
                await asyncio.sleep(0.02)

    async def _who(self, address: str) -> str | None:
        try:
            return (await self.rig.ask(CLIENT, address, 80))[0]
        except (OSError, TimeoutError):
            return None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("reconnects")
    async with service_rig() as rig:
        inside = run_in_netns(rig.fds["node"], lambda: socket.create_server(("127.0.0.1", 0)))
        outside = socket.socket(socket.AF_UNIX)
        outside.bind(str(folder / "api"))
        outside.listen()
        faults, store = Faults("podwire/proxy"), MemoryStore()
        app = create_app(store, ServerConfig(service_cidrs=FACTS.service_cidrs))
        app.middlewares.append(faults.middleware)
        server = ApiServer(app)
        await server.start([Listener(inside), Listener(outside)])
        token, config = folder / "token", folder / "kubeconfig"
        token.write_text("first")
        text = kubeconfig("test", f"http://127.0.0.1:{inside.getsockname()[1]}", b"", "none")
        config.write_text(text.replace("token: none", f"tokenFile: {token}"))
        process = _proxy(rig, folder / "log", config)
        try:
            async with ApiClient("http://api", unix_socket=str(folder / "api")) as client:
                await _node(client)
                yield Site(rig, client, faults, token)
            assert process.poll() is None, (folder / "log").read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)
            await server.stop()
            await store.close()


def _proxy(rig: ServiceRig, log: Path, config: Path) -> "subprocess.Popen[bytes]":
    fd = rig.fds["node"]
    command = [*PODWIRE, "proxy", "--kubeconfig", str(config), "--hostname-override", FACTS.name]
    with log.open("wb") as file:
        return subprocess.Popen(command, stderr=file, preexec_fn=lambda: setns(fd, CLONE_NEWNET))


async def _node(client: ApiClient) -> None:
    await client.create(NODES, {"metadata": {"name": FACTS.name}, "spec": {"podCIDR": "10.244.1.0/24"}})
    addresses = [{"type": "InternalIP", "address": str(ip)} for ip in FACTS.node_ips]
    await client.patch(NODES, FACTS.name, {"status": {"addresses": addresses}}, subresource="status")


async def test_watches_that_break_off(site: Site) -> None:
    web = await site.service("cut", "p2")
    await site.leads(web, "p2")
    for pod in ("p3", "far", "p2"):
        site.faults.break_off()
        await site.move("cut", pod)
        await site.leads(web, pod)


BOOKMARK: dict[str, Any] = {"kind": "EndpointSlice", "metadata": {"resourceVersion": "1"}}


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(Refusal(200, events(("BOOKMARK", BOOKMARK), ("ERROR", EXPIRED))), id="expired in the middle of a watch"),
        pytest.param(Refusal(410, '{"kind":"Status","code":410,"reason":"Expired"}'), id="expired at once"),
        pytest.param(Refusal(200, events(("ERROR", {"code": 500, "message": "etcdserver: no leader"}))), id="another error"),
        pytest.param(Refusal(200, '{"type":"MODIFIED","object":{"metadata":{"na'), id="cut in the middle of an event"),
        pytest.param(Refusal(200, "upstream connect error\n"), id="something else than an API server"),
        pytest.param(Refusal(503, "<html>bad gateway</html>", "1"), id="a balancer without a server"),
    ],
)
async def test_what_changed_while_it_was_away_is_made_up_for(site: Site, refusal: Refusal, request: Any) -> None:
    """One Service goes, one comes, one is led elsewhere; the server has forgotten how, or says nonsense at first."""
    name = f"s{abs(hash(request.node.callspec.id)) % 100000}"
    going, staying = await site.service(f"{name}-going", "p2"), await site.service(f"{name}-staying", "p2")
    await site.leads(going, "p2")
    await site.leads(staying, "p2")
    site.faults.away = True
    site.faults.break_off()
    await site.delete(f"{name}-going")
    await site.move(f"{name}-staying", "far")
    coming = await site.service(f"{name}-coming", "p3")
    site.faults.answer("watch", "services", refusal)
    site.faults.answer("watch", "endpointslices", refusal)
    site.faults.away = False
    await site.leads(coming, "p3")
    await site.leads(staying, "far")
    await site.leads(going, None)
    assert site.faults.used_up


async def test_a_busy_servers_wish_to_wait_is_heeded(site: Site) -> None:
    """429 with Retry-After, to a list and to a watch."""
    web = await site.service("busy", "p2")
    await site.leads(web, "p2")
    busy = Refusal(429, '{"kind":"Status","code":429,"reason":"TooManyRequests"}', "1")
    expired = Refusal(410, '{"kind":"Status","code":410,"reason":"Expired"}')
    site.faults.answer("watch", "endpointslices", busy, expired)
    site.faults.answer("list", "endpointslices", busy)
    started = time.monotonic()
    site.faults.break_off()
    await site.move("busy", "far")
    await site.leads(web, "far")
    assert 2.0 <= time.monotonic() - started < 6.0
    assert site.faults.used_up


async def test_a_token_that_is_good_no_more_and_then_replaced(site: Site) -> None:
    web = await site.service("token", "p2")
    await site.leads(web, "p2")
    site.faults.token = "second"
    site.faults.break_off()
    await site.faults.until(lambda: site.faults.unauthorized >= 3)
    await site.leads(web, "p2")
    await site.move("token", "p3")
    fresh = site.token.with_suffix(".new")
    fresh.write_text("second")
    fresh.rename(site.token)
    await site.leads(web, "p3")
    site.faults.token = ""


async def test_it_asked_for_nothing_that_its_manifest_does_not_allow(site: Site) -> None:
    allowed = rights_of("proxy/account.yaml")
    assert site.faults.rights <= allowed
    assert {(verb, plural) for verb, _, plural in allowed - site.faults.rights} <= {
        ("get", "nodes"), ("get", "configmaps"), ("create", "events"), ("patch", "events"), ("watch", "servicecidrs"),
        ("delete", "leases"),  # by --cleanup
    }  # fmt: skip
