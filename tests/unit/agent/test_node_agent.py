from podwire.model.resources import LEASES, NODES, PODS
from podwire.plan.naming import host_veth
from podwire.testing.memorycluster import MemoryCluster, condition


async def test_a_node_registers_and_becomes_ready(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, labels={"tier": "test"})
    async with cluster.agent(machine):
        node = await cluster.until(lambda: _ready_node(cluster, "n1"))
    assert node["metadata"]["labels"] | {"kubernetes.io/arch": ""} == {
        "kubernetes.io/hostname": "n1",
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "",
        "tier": "test",
    }
    assert node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ipv6"] == "2001:db8:1::11"
    assert condition(node, "NetworkUnavailable") == "False"
    assert node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] == 10250
    assert [a["address"] for a in node["status"]["addresses"]] == ["198.18.0.11", "2001:db8:1::11", "n1"]
    lease = await cluster.client.get(LEASES, "n1", "kube-node-lease")
    assert lease["spec"]["holderIdentity"] == "n1"
    assert {"cni0", "flannel.1", "flannel-v6.1"} <= set((await machine.kernel.observe()).links)


async def test_a_pod_runs_and_is_deleted_without_a_trace(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        before = await machine.kernel.observe()
        created = await cluster.create_pod("web", "n1")
        uid = created["metadata"]["uid"]
        pod = await cluster.until_running("web")
        assert pod["status"]["podIPs"] == [{"ip": "10.244.1.2"}, {"ip": "fd00:10:244:1::2"}]
        assert pod["status"]["hostIP"] == "198.18.0.11"
        assert pod["status"]["startTime"]
        assert pod["status"]["containerStatuses"][0]["ready"] is True
        assert (await machine.kernel.observe()).links[host_veth(uid)].alias == "podwire:default/web"
        await cluster.client.delete(PODS, "web", "default")
        await cluster.until(lambda: _gone(cluster, "web"))
        assert machine.runtime.boxes == {}
        assert machine.runtime.stops == [(uid, 30)]
        after = await machine.kernel.observe()
        assert (set(after.links), after.neighbours) == (set(before.links), before.neighbours)


async def _ready_node(cluster: MemoryCluster, name: str) -> object:
    node = await cluster.client.get(NODES, name)
    return node if condition(node, "Ready") == "True" else None


async def _gone(cluster: MemoryCluster, name: str) -> bool:
    return await cluster.exists(PODS, name, "default") is None
