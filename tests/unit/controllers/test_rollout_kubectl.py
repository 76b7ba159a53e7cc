"""A rollout as people drive it: with the real kubectl."""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest
from live_cluster import LiveCluster, live_cluster

from podwire.model.resources import NAMESPACES, PODS

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
pytestmark = [
    pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed"),
    pytest.mark.timeout(120),
]


class Kubectl:
    def __init__(self, cluster: LiveCluster, home: Path) -> None:
        self._url, self._home = cluster.url, home

    async def __call__(self, line: str) -> str:
        assert KUBECTL is not None
        process = await asyncio.create_subprocess_exec(
            KUBECTL,
            f"--server={self._url}",
            f"--cache-dir={self._home}/cache",
            *line.split(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"HOME": str(self._home), "PATH": os.defpath},
        )
        out, err = await process.communicate()
        assert process.returncode == 0, f"kubectl {line}: {out.decode()}{err.decode()}"
        return out.decode()


async def test_a_rollout_from_creation_to_undo(tmp_path: Path) -> None:
    async with live_cluster(nodes=2) as cluster:
        kubectl = Kubectl(cluster, tmp_path)
        await kubectl("create deployment web --image=web:1 --replicas=3")
        assert "successfully rolled out" in await kubectl("rollout status deployment/web --timeout=20s")
        assert "3/3" in await kubectl("get deployment web")
        await kubectl("set image deployment/web web=web:2")
        assert "successfully rolled out" in await kubectl("rollout status deployment/web --timeout=20s")
        history = await kubectl("rollout history deployment/web")
        assert [line.split()[0] for line in history.splitlines() if line[:1].isdigit()] == ["1", "2"]
        await kubectl("rollout undo deployment/web")
        await kubectl("rollout status deployment/web --timeout=20s")
        assert await kubectl("get deployment web -o jsonpath={.spec.template.spec.containers[0].image}") == "web:1"
        await kubectl("rollout restart deployment/web")
        await kubectl("rollout status deployment/web --timeout=20s")
        await kubectl("scale deployment/web --replicas=1")
        await kubectl("wait deployment/web --for=jsonpath={.status.availableReplicas}=1 --timeout=20s")
        described = await kubectl("describe deployment web")
        assert "ScalingReplicaSet" in described
        assert "NewReplicaSet:   web-" in described
        await kubectl("delete deployment web --cascade=foreground --timeout=20s")
        await cluster.until(PODS, lambda items: not items)


async def test_expose_and_delete_a_namespace(tmp_path: Path) -> None:
    async with live_cluster(nodes=2) as cluster:
        kubectl = Kubectl(cluster, tmp_path)
        await kubectl("create namespace shop")
        await kubectl("-n shop create deployment web --image=web:1 --replicas=2 --port=8080")
        await kubectl("-n shop rollout status deployment/web --timeout=20s")
        await kubectl("-n shop expose deployment web --port=80 --target-port=8080")
        await kubectl("-n shop wait pod --for=condition=Ready -l app=web --timeout=20s")
        described = await kubectl("-n shop describe service web")
        assert described.count(":8080") == 2, described
        await kubectl("delete namespace shop --timeout=20s")
        names = {item["metadata"]["name"] for item in await cluster.items(NAMESPACES)}
        assert "shop" not in names


async def test_pods_that_no_node_takes_can_be_deleted(tmp_path: Path) -> None:
    async with live_cluster() as cluster:
        kubectl = Kubectl(cluster, tmp_path)
        await kubectl("create deployment web --image=web:1 --replicas=3")
        await cluster.until(PODS, lambda items: len(items) == 3)
        await kubectl("delete deployment web")
        await cluster.until(PODS, lambda items: not items)
