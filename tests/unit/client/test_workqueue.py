import asyncio
from random import Random

import pytest

from podwire.client.workqueue import WorkQueue
from podwire.model.errors import PodwireError


async def test_waiting_keys_are_coalesced_in_order_of_arrival() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for key in "abca":
        queue.add(key)
    assert [await queue.get() for _ in range(3)] == ["a", "b", "c"]


async def test_a_key_added_while_it_is_worked_on_is_worked_on_once_more() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    key = await queue.get()
    queue.add("a")
    queue.add("a")
    queue.add("b")
    assert await queue.get() == "b"
    queue.done(key)
    assert await queue.get() == "a"
    queue.done("a")
    queue.done("b")
    assert len(queue) == 0


async def test_delayed_keys_come_when_due_and_the_earliest_wins() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("late", 60)
    queue.add_after("late", 0.01)
    queue.add_after("late", 60)
    async with asyncio.timeout(5):
        assert await queue.get() == "late"
    queue.add_after("never", 60)
    queue.close()


async def test_failures_are_retried_with_growing_delay_and_success_forgets_them() -> None:
    queue: WorkQueue[str] = WorkQueue(Random(1), initial_delay=0.01)
    delays = []
    for _ in range(4):
        queue.add("a")
        delays.append(queue.failed(await queue.get()))
    assert delays[3] > delays[1] > delays[0]
    queue.add("a")
    queue.done(await queue.get())
    queue.add("a")
    assert queue.failed(await queue.get()) < 0.02
    queue.close()


async def test_run_retries_what_is_expected_and_ends_with_what_is_not() -> None:
    queue: WorkQueue[str] = WorkQueue(Random(1), initial_delay=0.001)
    attempts: list[str] = []

    async def work(key: str) -> None:
        attempts.append(key)
        if len(attempts) < 3:
            raise PodwireError("not yet")
        raise ValueError("a bug")

    queue.add("a")
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(5):
            await queue.run(work, expected=(PodwireError,))
    assert caught.value.subgroup(ValueError) is not None
    assert attempts == ["a", "a", "a"]
