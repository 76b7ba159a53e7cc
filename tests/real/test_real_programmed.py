"""What nodes acknowledge, against Kubernetes' own API server and its history."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hostrig import machines
from kuberig import Kubernetes, kubernetes, register

from podwire.cli.programmed import read_all
from podwire.model.acknowledgement import Acknowledgement, lease_document
from podwire.model.resources import LEASES, SERVICES, Resource

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

SLICES = Resource("discovery.k8s.io", "v1beta1", "endpointslices", "EndpointSlice")


async def late(kube: Kubernetes) -> list[str]:
    found: dict[str, Any] = next(row for row in await read_all(kube.client, "default") if row["name"] == "web")
    names: list[str] = found["late"]
    return names


async def slice_made(kube: Kubernetes, name: str) -> None:
    meta = {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}}
    endpoints = [{"addresses": ["10.244.1.2"]}]
    await kube.client.create(SLICES, {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": []})


async def test_a_slice_that_went_makes_nodes_late_until_they_say_so(tmp_path: Path) -> None:
    async with machines(tmp_path, 1), kubernetes(tmp_path / "kube") as kube:
        await register(kube.client, "n1", "198.18.0.11", "10.244.1.0/24")
        await kube.client.create(
            SERVICES, {"metadata": {"name": "web", "namespace": "default"}, "spec": {"ports": [{"port": 80}]}}
        )
        for name in ("web-1", "web-2"):
            await slice_made(kube, name)

        async def say(revision: str) -> None:
            word = Acknowledgement(node="n1", services=revision, slices=revision, slices_until=revision, at=datetime.now(UTC))
            document = lease_document(word)
            if known:
                await kube.client.patch(LEASES, document["metadata"]["name"], document, "kube-system")
            else:
                await kube.client.create(LEASES, document)
            known.append(revision)

        async def now() -> str:
            return (await kube.client.list(SLICES)).resource_version

        known: list[str] = []
        await say(await now())
        assert await late(kube) == []
        await kube.client.delete(SLICES, "web-2", "default")
        assert await late(kube) == ["n1"]
        await say(await now())
        assert await late(kube) == []
        await slice_made(kube, "web-3")
        await say(await now())
        await kube.client.delete(SLICES, "web-3", "default")
        await kube.compact()
        assert await late(kube) == ["n1"], "the history is gone: it is not known what the node had"
        await say(await now())
        assert await late(kube) == []
