"""`podwire server` several times on one etcd: the same objects everywhere, one leader of the controllers, kills of either."""

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from etcdclusters import fresh_etcd, three_members
from etcdrig import free_port
from hostrig import answering, until

from podwire.client.api import ApiClient
from podwire.client.etcd import EtcdClient
from podwire.model.meta import Json
from podwire.model.resources import DEPLOYMENTS, ENDPOINTSLICES, IPADDRESSES, LEASES, REPLICASETS, SERVICECIDRS, SERVICES

pytestmark = pytest.mark.timeout(120)

RUN = """
import asyncio, ipaddress, sys
from pathlib import Path
from podwire.controllers.leader import ElectionTimes
from podwire.hosts.server import EtcdOptions, ServerOptions, run_server
data, port, address, *etcd = sys.argv[1:]
asyncio.run(run_server(ServerOptions(
    advertise=(ipaddress.ip_address(address),), data=Path(data), listen=("127.0.0.1", int(port)), names=("127.0.0.1",),
    etcd=EtcdOptions(tuple(etcd)), election=ElectionTimes(lease=2.0, renew=1.2, retry=0.2))))
"""


class Server:
    """One server process, and a client of it."""

    def __init__(self, data: Path, address: str, etcd: list[str]) -> None:
        self.data, self.port, self._arguments = data, free_port(), (address, *etcd)
        self.process: asyncio.subprocess.Process | None = None
        self.client: ApiClient | None = None

    async def start(self) -> ApiClient:
        with (self.data.parent / f"{self.data.name}.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", RUN, str(self.data), str(self.port), *self._arguments, stdout=log, stderr=log
            )
        kubeconfig = self.data / "admin.kubeconfig"
        text = kubeconfig.read_text() if kubeconfig.exists() else ""
        async with asyncio.timeout(20):
            while not kubeconfig.exists() or kubeconfig.read_text() == text:  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.05)
        reachable = self.data / "reachable.kubeconfig"
        reachable.write_text(kubeconfig.read_text().replace(self._arguments[0], "127.0.0.1"))
        self.client = await answering(reachable)
        return self.client

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.client is not None:
            await self.client.close()
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(how)
        return await asyncio.wait_for(process.wait(), 15)


@asynccontextmanager
async def servers(root: Path, etcd: list[str]) -> AsyncIterator[tuple[Server, Server]]:
    """Two, the second with the first one's pki."""
    one, two = (Server(root / name, address, etcd) for name, address in (("one", "192.0.2.1"), ("two", "192.0.2.2")))
    try:
        await one.start()
        shutil.copytree(one.data / "pki", two.data / "pki")
        await two.start()
        yield one, two
    finally:
        for server in (one, two):
            await server.end(signal.SIGKILL)


def deployment(name: str) -> Json:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    return {"metadata": {"name": name, "namespace": "default"}, "spec": spec}


def service(name: str) -> Json:
    return {"metadata": {"name": name, "namespace": "default"}, "spec": {"ports": [{"port": 80}]}}


async def leader(client: ApiClient) -> str:
    lease = await client.get(LEASES, "podwire-controllers", "kube-system")
    return str(lease["spec"]["holderIdentity"])


async def test_two_servers_are_one_cluster_and_outlive_each_other(tmp_path: Path) -> None:
    async with fresh_etcd(tmp_path) as etcd, servers(tmp_path, list(etcd.endpoints)) as (one, two):
        assert one.client is not None
        assert two.client is not None
        clients = (one.client, two.client)
        made = await asyncio.gather(
            *(client.create(SERVICES, service(f"s{n}{k}")) for n in range(20) for k, client in enumerate(clients))
        )
        addresses = {s["spec"]["clusterIP"] for s in made}
        assert len(addresses) == 40
        assert addresses < {a["metadata"]["name"] for a in (await two.client.list(IPADDRESSES)).items}
        await one.client.create(SERVICECIDRS, {"metadata": {"name": "more"}, "spec": {"cidrs": ["192.168.9.0/28"]}})
        wish = service("wish")
        wish["spec"]["clusterIP"] = "192.168.9.3"
        await two.client.create(SERVICES, wish)
        await one.client.delete(SERVICECIDRS, "more")
        await until(two.client, SERVICECIDRS, lambda found: any(_reason(cidr) == "Terminating" for cidr in found))
        await one.client.delete(SERVICES, "wish", "default")
        await until(two.client, SERVICECIDRS, lambda found: len(found) == 1)
        own = await until(two.client, ENDPOINTSLICES, _both_answer)
        assert own
        by_identity = {(s.data / "identity").read_text().strip(): s for s in (one, two)}
        first = by_identity[await leader(one.client)]
        second = two if first is one else one
        assert second.client is not None
        await second.client.create(DEPLOYMENTS, deployment("a"))
        await until(second.client, REPLICASETS, lambda found: len(found) == 1)
        await first.end(signal.SIGKILL)
        await second.client.create(DEPLOYMENTS, deployment("b"))
        await until(second.client, REPLICASETS, lambda found: len(found) == 2)
        assert by_identity[await leader(second.client)] is second
        again = await first.start()
        assert len((await again.list(REPLICASETS)).items) == 2
        assert await second.end() == 0
        await again.create(DEPLOYMENTS, deployment("c"))
        await until(again, REPLICASETS, lambda found: len(found) == 3)
        # Laid out as kube-apiserver has it, so that one can take over.
        keys = {kv.key.rpartition("/")[0] for kv in (await etcd.read("/registry/", prefix=True)).kvs}
        assert {"/registry/services/specs/default", "/registry/deployments/default", "/registry/replicasets/default"} <= keys
        assert {"/registry/ipaddresses", "/registry/servicecidrs"} <= keys
        stored = await etcd.get("/registry/deployments/default/a")
        assert stored is not None
        assert json.loads(stored.value)["apiVersion"] == "apps/v1"
        await etcd.close()


def _reason(cidr: Json) -> str:
    return str(cidr["status"]["conditions"][0]["reason"])


def _both_answer(slices: list[Json]) -> bool:
    own = [s for s in slices if s["metadata"]["name"] == "kubernetes"]
    return bool(own) and [e["addresses"][0] for e in own[0]["endpoints"]] == ["192.0.2.1", "192.0.2.2"]


async def test_an_etcd_member_killed_is_not_noticed_by_clients(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        members = await stack.enter_async_context(three_members(tmp_path))
        urls = [member.client_url for member in members]
        one, two = await stack.enter_async_context(servers(tmp_path, urls))
        assert one.client is not None
        assert two.client is not None
        async with EtcdClient(urls) as etcd:
            chief = (await etcd.status()).leader
            ids = [(await _status(member.client_url)) for member in members]
        killed = members[ids.index(chief)]
        await killed.end(signal.SIGKILL)
        made = await asyncio.gather(*(one.client.create(SERVICES, service(f"s{n}")) for n in range(10)))
        seen = await until(two.client, SERVICES, lambda found: len(found) == 11)
        assert {s["spec"]["clusterIP"] for s in made} < {s["spec"]["clusterIP"] for s in seen}
        await two.client.create(DEPLOYMENTS, deployment("a"))
        await until(one.client, REPLICASETS, lambda found: len(found) == 1)


async def _status(url: str) -> int:
    async with EtcdClient([url]) as etcd:
        return (await etcd.status()).header.member_id
