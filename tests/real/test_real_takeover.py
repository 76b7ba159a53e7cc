"""One etcd, first podwire's API server's, then Kubernetes' own, then podwire's again: what one wrote the other serves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from etcdrig import Member, one_member
from hostrig import Host, answering, deployment, machines, until
from kuberig import ADDRESS, kubernetes, program

from podwire.client.api import ApiClient
from podwire.client.errors import Invalid
from podwire.model.meta import Json
from podwire.model.resources import CONFIGMAPS, DEPLOYMENTS, ENDPOINTSLICES, NAMESPACES, PODS, SECRETS, SERVICES

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(180)]


@asynccontextmanager
async def podwire_server(host: Host, data: Path, etcd: Member) -> AsyncIterator[ApiClient]:
    network = ("--service-cidr", "10.96.0.0/16")
    await host.start("server", "--data-dir", str(data), "--advertise", host.address, "--etcd", etcd.client_url, *network)
    async with await answering(data / "admin.kubeconfig") as client:
        yield client
    assert await host.end() == 0


def service_of_web(name: str, **spec: str) -> Json:
    return {
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}], **spec},
    }


async def test_there_and_back(tmp_path: Path) -> None:
    program("kube-apiserver")
    async with machines(tmp_path, 1) as (host,), one_member(tmp_path, host=ADDRESS) as etcd:
        async with podwire_server(host, tmp_path / "server", etcd) as client:
            await client.create(NAMESPACES, {"metadata": {"name": "shop"}})
            await client.create(CONFIGMAPS, {"metadata": {"name": "settings"}, "data": {"colour": "blue"}}, "shop")
            await client.create(SECRETS, {"metadata": {"name": "key"}, "data": {"k": "djE="}}, "shop")
            service = await client.create(SERVICES, service_of_web("web"))
            await client.create(DEPLOYMENTS, deployment("web", 2))
            pods = await until(client, PODS, lambda found: len(found) == 2)
        async with kubernetes(tmp_path / "kubernetes", "--storage-media-type=application/json", on=etcd) as kube:
            there = kube.client
            assert (await there.get(CONFIGMAPS, "settings", "shop"))["data"] == {"colour": "blue"}
            assert (await there.get(SECRETS, "key", "shop"))["data"] == {"k": "djE="}
            assert (await there.get(SERVICES, "web", "shop"))["spec"]["clusterIP"] == service["spec"]["clusterIP"]
            same = {pod["metadata"]["uid"] for pod in (await there.list(PODS)).items}
            assert same == {pod["metadata"]["uid"] for pod in pods}
            with pytest.raises(Invalid, match="already allocated"):
                await there.create(SERVICES, service_of_web("other", clusterIP=service["spec"]["clusterIP"]))
            await there.patch(CONFIGMAPS, "settings", {"data": {"colour": "red"}}, "shop")
            await there.delete(SECRETS, "key", "shop")
            await there.patch(DEPLOYMENTS, "web", {"spec": {"replicas": 3}}, "default")
            second = await there.create(SERVICES, service_of_web("second"))
            assert "web" in await kube.kubectl("get", "services,deployments,pods", "-A")
        async with podwire_server(host, tmp_path / "server", etcd) as client:
            assert (await client.get(CONFIGMAPS, "settings", "shop"))["data"] == {"colour": "red"}
            assert not [s for s in (await client.list(SECRETS, "shop")).items if s["metadata"]["name"] == "key"]
            assert (await client.get(SERVICES, "second", "shop"))["spec"]["clusterIP"] == second["spec"]["clusterIP"]
            await until(client, PODS, lambda found: len(found) == 3 and same < {pod["metadata"]["uid"] for pod in found})
            await until(client, ENDPOINTSLICES, lambda found: any(s["metadata"]["name"].startswith("second") for s in found))
