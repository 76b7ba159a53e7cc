"""What becomes of pods on a node: rejected, finished, deleted in every way, and what an agent finds when it starts again."""

import asyncio
import errno

import pytest

from podwire.agent.reservations import Reservations
from podwire.model.ids import pod_netns
from podwire.model.meta import Json
from podwire.model.ops import AddLink, DelLink
from podwire.model.resources import EVENTS, PODS
from podwire.plan.naming import host_veth
from podwire.testing.fakekernel import FakeKernel
from podwire.testing.memorycluster import Machine, MemoryCluster, condition


def reserved(machine: Machine[FakeKernel]) -> set[str]:
    book = Reservations(machine.config.state_dir / "reservations.db")
    try:
        return {str(r.address) for r in book.all()}
    finally:
        book.close()


async def gone(cluster: MemoryCluster, name: str) -> bool:
    return await cluster.exists(PODS, name, "default") is None


async def test_a_host_network_pod_has_the_nodes_addresses_and_no_link(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        created = await cluster.create_pod("host", "n1", hostNetwork=True)
        pod = await cluster.until_running("host")
        assert [entry["ip"] for entry in pod["status"]["podIPs"]] == ["198.18.0.11", "2001:db8:1::11"]
        assert host_veth(created["metadata"]["uid"]) not in (await machine.kernel.observe()).links
        assert reserved(machine) == set()
        await cluster.client.delete(PODS, "host", "default")
        await cluster.until(lambda: gone(cluster, "host"))


async def test_a_second_pod_with_the_same_host_port_is_rejected(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    ports = [{"name": "app", "image": "web", "ports": [{"containerPort": 80, "hostPort": 8080}]}]
    async with cluster.agent(machine):
        await cluster.create_pod("first", "n1", containers=ports)
        await cluster.until_running("first")
        await cluster.create_pod("second", "n1", containers=ports)
        pod = await cluster.until(lambda: _in_phase(cluster, "second", "Failed"))
        assert pod["status"]["reason"] == "NodePorts"
        assert "8080/TCP is in use by pod default/first" in pod["status"]["message"]
        await cluster.client.delete(PODS, "second", "default")
        await cluster.until(lambda: gone(cluster, "second"))
        assert len(machine.runtime.boxes) == 1


async def test_more_pods_than_the_node_takes_are_rejected(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1, max_pods=1)
    async with cluster.agent(machine):
        await cluster.create_pod("first", "n1")
        await cluster.until_running("first")
        await cluster.create_pod("second", "n1")
        pod = await cluster.until(lambda: _in_phase(cluster, "second", "Failed"))
        assert pod["status"]["reason"] == "OutOfpods"


async def test_a_finished_pod_gives_its_address_back_and_keeps_its_status(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        created = await cluster.create_pod("job", "n1", restartPolicy="Never")
        uid = created["metadata"]["uid"]
        await cluster.until_running("job")
        machine.runtime.finish(uid)
        pod = await cluster.until(lambda: _in_phase(cluster, "job", "Succeeded"))
        assert condition(pod, "Ready") == "False"
        assert condition(pod, "Initialized") == "True"
        assert pod["status"]["podIP"] == "10.244.1.2"
        await cluster.until(lambda: not reserved(machine))
        assert host_veth(uid) not in (await machine.kernel.observe()).links
        assert uid in machine.runtime.boxes  # its logs can still be read
    async with cluster.agent(machine):
        await cluster.client.delete(PODS, "job", "default")
        await cluster.until(lambda: gone(cluster, "job"))
        await cluster.until(lambda: not machine.runtime.boxes)


async def test_deletion_by_force_ends_the_pod_at_once(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        created = await cluster.create_pod("web", "n1")
        await cluster.until_running("web")
        await cluster.client.delete(PODS, "web", "default", grace_period_seconds=0)
        await cluster.until(lambda: not machine.runtime.boxes)
        assert machine.runtime.stops == [(created["metadata"]["uid"], 0)]
        await cluster.until(lambda: not reserved(machine))


async def test_a_grace_that_is_cut_short_counts(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        created = await cluster.create_pod("web", "n1")
        uid = created["metadata"]["uid"]
        await cluster.until_running("web")
        machine.runtime.hold_stop = True
        await cluster.client.delete(PODS, "web", "default", grace_period_seconds=30)
        await cluster.until(lambda: machine.runtime.stops == [(uid, 30)])
        await cluster.client.delete(PODS, "web", "default", grace_period_seconds=0)
        await cluster.until(lambda: not machine.runtime.boxes)
        assert machine.runtime.stops == [(uid, 30), (uid, 0)]


@pytest.mark.parametrize("method", ["create_sandbox", "start"])
async def test_what_the_runtime_fails_is_tried_again_and_told(cluster: MemoryCluster, method: str) -> None:
    machine = cluster.machine(1)
    machine.runtime.fail_next(method, times=2)
    async with cluster.agent(machine):
        await cluster.create_pod("web", "n1")
        pod = await cluster.until_running("web")
        assert pod["status"]["podIP"] == "10.244.1.2"
        events = await cluster.until(lambda: _events(cluster, "FailedCreatePodSandBox"))
        assert f"injected: {method}" in events[0]["message"]


@pytest.mark.parametrize("op", ["AddLink", "AddAddress", "SetRoute", "SetNeighbour"])
async def test_what_the_kernel_refuses_once_does_not_matter(cluster: MemoryCluster, op: str) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        machine.kernel.fail_next(op, errno.ENOBUFS)
        created = await cluster.create_pod("web", "n1")
        await cluster.until_running("web")
        inside = machine.kernel.space(pod_netns(created["metadata"]["uid"])).state()
        assert len([a for a in inside.addresses if a.dev == "eth0" and not a.interface.is_link_local]) == 2
        assert {str(r.dst) for r in inside.routes} == {"0.0.0.0/0", "::/0"}


async def test_a_new_agent_takes_over_without_touching_anything(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        for name in ("a", "b"):
            await cluster.create_pod(name, "n1")
            await cluster.until_running(name)
    first = await cluster.pod("a")
    machine.kernel.applied.clear()
    async with cluster.agent(machine):
        await cluster.create_pod("c", "n1")
        pod = await cluster.until_running("c")
        made = [op.link.name for op in machine.kernel.applied if isinstance(op, AddLink)]
        assert made == [host_veth(pod["metadata"]["uid"])]
        assert not [op for op in machine.kernel.applied if isinstance(op, DelLink)]
        assert len(machine.runtime.created) == 3
        again = await cluster.pod("a")
    assert again["status"]["podIPs"] == first["status"]["podIPs"]
    assert again["status"]["conditions"] == first["status"]["conditions"]


async def test_pods_deleted_while_no_agent_ran_are_ended_by_the_next(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        for name in ("forced", "graceful", "stays"):
            await cluster.create_pod(name, "n1")
            await cluster.until_running(name)
    await cluster.client.delete(PODS, "forced", "default", grace_period_seconds=0)
    await cluster.client.delete(PODS, "graceful", "default")
    async with cluster.agent(machine):
        await cluster.until(lambda: len(machine.runtime.boxes) == 1)
        await cluster.until(lambda: gone(cluster, "graceful"))
        await cluster.until(lambda: len(reserved(machine)) == 2)
        veths = [name for name in (await machine.kernel.observe()).links if name.startswith("veth")]
        assert len(veths) == 1
        assert condition(await cluster.pod("stays"), "Ready") == "True"


async def test_an_agent_killed_at_any_step_of_a_pods_start_leaks_nothing(cluster: MemoryCluster) -> None:
    """Kill it after each number of event loop turns, delete the pod, start a new agent: no address, no link stays."""
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        pass
    for turns in range(0, 60, 6):
        name = f"p{turns}"
        async with cluster.agent(machine):
            await cluster.create_pod(name, "n1")
            for _ in range(turns):
                await asyncio.sleep(0)
        await cluster.client.delete(PODS, name, "default", grace_period_seconds=0)
    async with cluster.agent(machine):
        await cluster.until(lambda: not machine.runtime.boxes and not reserved(machine))
        assert not [name for name in (await machine.kernel.observe()).links if name.startswith("veth")]


async def test_a_lost_sandbox_is_built_anew_at_the_same_address(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        created = await cluster.create_pod("web", "n1")
        uid = created["metadata"]["uid"]
        before = await cluster.until_running("web")
        machine.kernel.destroy(pod_netns(uid))
        machine.runtime.lose_sandbox(uid)
        await cluster.until(lambda: machine.runtime.created == [uid, uid])
        await cluster.until(lambda: uid in machine.runtime.started)
        after = await cluster.until_running("web")
        assert after["status"]["podIPs"] == before["status"]["podIPs"]
        assert host_veth(uid) in (await machine.kernel.observe()).links
        assert await cluster.until(lambda: _events(cluster, "SandboxChanged"))


async def test_a_lost_sandbox_is_the_end_of_a_pod_that_never_restarts(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        created = await cluster.create_pod("job", "n1", restartPolicy="Never")
        await cluster.until_running("job")
        machine.runtime.lose_sandbox(created["metadata"]["uid"])
        pod = await cluster.until(lambda: _in_phase(cluster, "job", "Failed"))
        assert pod["status"]["reason"] == "SandboxLost"
        await cluster.until(lambda: not reserved(machine))


async def test_a_pod_of_the_same_name_gets_nothing_of_its_predecessors_status(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        for _ in range(5):
            created = await cluster.create_pod("web", "n1")
            uid = created["metadata"]["uid"]
            pod = await cluster.until_running("web")
            address = pod["status"]["podIP"]
            inside = machine.kernel.space(pod_netns(uid)).state()
            assert address in {str(a.interface.ip) for a in inside.addresses}
            await cluster.client.delete(PODS, "web", "default", grace_period_seconds=0)


async def test_a_pod_that_others_called_unready_while_the_node_was_silent_is_ready_again(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        await cluster.create_pod("web", "n1")
        pod = await cluster.until_running("web")
        stale = {"type": "Ready", "status": "False", "reason": "NodeNotReady"}
        kept = [c for c in pod["status"]["conditions"] if c["type"] != "Ready"]
        patch = {"status": {"conditions": [*kept, stale]}}
        await cluster.client.patch(PODS, "web", patch, "default", subresource="status")

        async def ready_again() -> bool:
            return condition(await cluster.client.get(PODS, "web", "default"), "Ready") == "True"

        await cluster.until(ready_again)


async def test_two_pods_never_share_an_address(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        await asyncio.gather(*(cluster.create_pod(f"p{n}", "n1") for n in range(20)))
        pods = [await cluster.until_running(f"p{n}") for n in range(20)]
    addresses = [entry["ip"] for pod in pods for entry in pod["status"]["podIPs"]]
    assert len(set(addresses)) == 40


async def _in_phase(cluster: MemoryCluster, name: str, phase: str) -> Json | None:
    pod = await cluster.pod(name)
    return pod if pod["status"].get("phase") == phase else None


async def _events(cluster: MemoryCluster, reason: str) -> list[Json]:
    found = await cluster.client.list(EVENTS, "default")
    return [event for event in found.items if event["reason"] == reason]
