import asyncio
from datetime import UTC, datetime

from scripted_server import ScriptedServer

from podwire.client.events import EventKey, EventRecorder
from podwire.model.meta import ObjectMeta
from podwire.model.resources import PODS

META = ObjectMeta(name="web", namespace="shop", uid="u1")
PATH = "/api/v1/namespaces/shop/events"


async def run_until(recorder: EventRecorder, server: ScriptedServer, count: int) -> None:
    task = asyncio.create_task(recorder.run())
    await server.answers_given(count)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_repeats_are_counted_in_one_event() -> None:
    server = ScriptedServer()
    server.answer("POST", PATH, {}, 201)
    async with server.serve() as client:
        recorder = EventRecorder(client, "scheduler", now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
        for _ in range(3):
            recorder.record(PODS, META, "Warning", "FailedScheduling", "no node fits")
        await run_until(recorder, server, 1)
        event = server.requests[0][3]
        name = event["metadata"]["name"]
        server.answer("PATCH", f"{PATH}/{name}", {})
        recorder.record(PODS, META, "Warning", "FailedScheduling", "no node fits")
        await run_until(recorder, server, 2)
    assert event["count"] == 3
    assert event["involvedObject"] == {"apiVersion": "v1", "kind": "Pod", "name": "web", "namespace": "shop", "uid": "u1"}
    assert event["firstTimestamp"] == "2026-01-01T00:00:00Z"
    assert server.requests[1][3]["count"] == 4


async def test_a_restarted_component_goes_on_counting() -> None:
    server = ScriptedServer()
    server.answer("POST", PATH, {"code": 409, "reason": "AlreadyExists"}, 409)
    async with server.serve() as client:
        recorder = EventRecorder(client, "scheduler")
        recorder.record(PODS, META, "Warning", "FailedScheduling", "no node fits")
        name = EventKey(PODS, "shop", "web", "u1", "Warning", "FailedScheduling", "no node fits").event_name
        server.answer("GET", f"{PATH}/{name}", {"count": 6})
        server.answer("PATCH", f"{PATH}/{name}", {})
        await run_until(recorder, server, 3)
    assert server.requests[2][3]["count"] == 7
