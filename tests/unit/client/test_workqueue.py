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


async def test_run_retries_what_fails_and_no_failure_holds_up_other_keys(caplog: pytest.LogCaptureFixture) -> None:
    queue: WorkQueue[str] = WorkQueue(Random(1), initial_delay=0.001)
    attempts: list[str] = []
    done = asyncio.Event()

    async def work(key: str) -> None:
        attempts.append(key)
        match attempts.count("bad"):
            case 1 if key == "bad":
                raise PodwireError("not yet")
            case 2 if key == "bad":
                raise ValueError("a bug")
            case 3:
                done.set()

    queue.add("bad")
    queue.add("good")
    running = asyncio.create_task(queue.run(work, expected=(PodwireError,)))
    async with asyncio.timeout(5):
        await done.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert attempts == ["bad", "good", "bad", "bad"]
    assert [record.exc_info is not None for record in caplog.records if "bad" in record.getMessage()][-1]
