"""Leader election against the real API server: one at a time, whatever happens to the leader."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from random import Random

import pytest
from live_cluster import LiveCluster, free_port

from podwire.client.api import ApiClient
from podwire.controllers.leader import ElectionTimes, LeaderElection
from podwire.model.errors import InvalidInput
from podwire.model.resources import LEASES
from podwire.store.memory import MemoryStore

TIMES = ElectionTimes(lease=1.0, renew=0.6, retry=0.05)


class Candidate:
    """One process: its election, its work, and who else works at the same time."""

    working: set[str] = set()  # noqa: RUF012 - shared by the candidates of a test on purpose

    def __init__(self, client: ApiClient, name: str) -> None:
        self.name = name
        self.election = LeaderElection(client, "controllers", name, lambda: datetime.now(UTC), times=TIMES, rng=Random(name))
        self.started, self.ended = asyncio.Event(), asyncio.Event()
        self.most = 0
        self.task = asyncio.create_task(self.election.run(self._work))

    async def _work(self) -> None:
        self.working.add(self.name)
        self.most = max(self.most, len(self.working))
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.working.discard(self.name)
            self.started.clear()
            self.ended.set()

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def cluster() -> AsyncIterator[LiveCluster]:
    store, port = MemoryStore(), free_port()
    Candidate.working.clear()
    async with ApiClient(f"http://127.0.0.1:{port}") as client:
        made = LiveCluster(client, store, port)
        await made.start_server()
        yield made
        await client.close()
        await made.stop_server()
        await store.close()


async def led_by(candidates: list[Candidate], within: float = 5.0) -> Candidate:
    waiting = {asyncio.create_task(c.started.wait()): c for c in candidates}
    done, rest = await asyncio.wait(waiting, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    assert done, "nobody leads"
    return waiting[next(iter(done))]


async def test_one_works_and_hands_over_at_its_end(cluster: LiveCluster) -> None:
    candidates = [Candidate(cluster.client, name) for name in ("a", "b", "c")]
    for turn in range(3):
        leader = await led_by(candidates)
        lease = await cluster.client.get(LEASES, "controllers", "kube-system")
        assert lease["spec"]["holderIdentity"] == leader.name
        assert lease["spec"]["leaseTransitions"] >= turn
        before = asyncio.get_running_loop().time()
        await leader.stop()
        candidates.remove(leader)
        if candidates:
            await led_by(candidates)
            assert asyncio.get_running_loop().time() - before < TIMES.lease  # it was given back, not waited for
        assert leader.most == 1


async def test_a_leader_that_is_silent_is_followed_only_after_its_time(cluster: LiveCluster) -> None:
    """As after kill -9: the Lease stays as it was."""
    spec = {"holderIdentity": "dead", "leaseDurationSeconds": 1, "renewTime": "2026-01-01T00:00:00.000000Z"}
    await cluster.client.create(LEASES, {"metadata": {"name": "controllers", "namespace": "kube-system"}, "spec": spec})
    before = asyncio.get_running_loop().time()
    candidates = [Candidate(cluster.client, name) for name in ("a", "b")]
    leader = await led_by(candidates)
    assert asyncio.get_running_loop().time() - before > 0.9
    assert leader.most == 1
    for candidate in candidates:
        await candidate.stop()


async def test_without_the_api_the_leader_stops_working(cluster: LiveCluster) -> None:
    candidate = Candidate(cluster.client, "a")
    await led_by([candidate])
    await cluster.stop_server()
    await asyncio.wait_for(candidate.ended.wait(), 5)
    await cluster.start_server()
    await led_by([candidate])
    await candidate.stop()


async def test_whoever_finds_another_in_the_lease_stops_at_once(cluster: LiveCluster) -> None:
    candidate = Candidate(cluster.client, "a")
    await led_by([candidate])
    await cluster.client.patch(LEASES, "controllers", {"spec": {"holderIdentity": "b"}}, "kube-system")
    await asyncio.wait_for(candidate.ended.wait(), TIMES.renew)
    await candidate.stop()


async def test_an_error_of_the_work_is_the_callers(cluster: LiveCluster) -> None:
    async def fails() -> None:
        raise ValueError("broken")

    election = LeaderElection(cluster.client, "other", "a", lambda: datetime.now(UTC), times=TIMES)
    with pytest.raises(ValueError, match="broken"):
        await election.run(fails)


def test_times_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="must be longer"):
        ElectionTimes(lease=5, renew=10)
