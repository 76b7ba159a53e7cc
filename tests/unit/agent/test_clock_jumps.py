"""The machine's clock is set, by hours in either direction: nothing is freed, and nothing waits for the old time."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
from cnirig import config, environment, execute

from podwire.agent import presence
from podwire.agent.registration import LEASE_NAMESPACE, NodeState, read_machine
from podwire.model.addr import Family
from podwire.model.resources import LEASES, NODES
from podwire.model.timestamps import parse_time
from podwire.testing.memorycluster import MemoryCluster, condition


class Clock:
    """The machine's, which may be set."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("hours", [30, -30])
async def test_pods_and_containers_keep_what_they_have(
    cluster: MemoryCluster, clock: Clock, tmp_path: Path, hours: int
) -> None:
    socket = tmp_path / "cni.sock"
    machine = cluster.machine(1, (Family.IPV4,), cni_socket=socket, heartbeat_seconds=0.05)
    async with cluster.agent(machine, clock=clock):
        await cluster.create_pod("web", "n1")
        before = await cluster.until_running("web")
        clock.ahead = timedelta(hours=hours)

        async def told() -> bool:
            lease = await cluster.client.get(LEASES, "n1", LEASE_NAMESPACE)
            return abs(parse_time(lease["spec"]["renewTime"]) - clock()) < timedelta(minutes=1)

        await cluster.until(told)
        assert (await execute(environment(socket, "PODWIRE-COLLECT"), config())).document == {"freed": 0}
        await cluster.create_pod("later", "n1")
        later = await cluster.until_running("later")
        assert (await cluster.pod("web"))["status"] == before["status"]
        assert later["status"]["podIP"] != before["status"]["podIP"]
        assert condition(await cluster.client.get(NODES, "n1"), "Ready") == "True"


async def test_that_a_node_is_not_ready_is_said_though_the_clock_was_set_back(
    cluster: MemoryCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new agent is silent for some seconds about a node that is ready: not until the old time comes again."""
    monkeypatch.setattr(presence, "TAKEOVER_SECONDS", 0.2)
    machine = cluster.machine(1, (Family.IPV4,))
    async with cluster.agent(machine):
        pass
    new = presence.Presence(machine.config, cluster.client, read_machine(), clock, Random(1))
    await new.register()
    running = asyncio.create_task(new.run())
    clock.ahead = -timedelta(hours=30)

    async def told() -> bool:
        new.set_state(NodeState(message=f"look {clock()}"))
        return condition(await cluster.client.get(NODES, "n1"), "Ready") == "False"

    await cluster.until(told)
    running.cancel()
