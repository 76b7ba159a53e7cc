"""What a lab can be asked beyond the Kubernetes API: HTTP routes on the same port, behind the same token.

* GET    /lab/v1/status                {"name", "nodes": [{"name", "agent": {…}}]}
* POST   /lab/v1/nodes                 add a node → {"name"}, when it is ready
* DELETE /lab/v1/nodes/{node}          remove one
* POST   /lab/v1/nodes/{node}/restart  kill its agent and start another
* POST   /lab/v1/nodes/{node}/proxy-mode?mode=  serve its Services by another back end
* GET    /lab/v1/faults               those in force (`podwire.lab.faults.Fault`, as "text" in words)
* POST   /lab/v1/faults               put one in force
* DELETE /lab/v1/faults?place=        heal those that concern these places, or all → {"healed"}
* DELETE /lab/v1/nodes/{node}/{what}  remove what its agent has programmed → {"removed"}
* POST   /lab/v1/paths?pod=&to=        probe → the paths report (`podwire.lab.report.document`)
* POST   /lab/v1/verify/overlay       check and probe → the report (`podwire.lab.verify.document`)
* POST   /lab/v1/settle?within=        wait until every node has programmed what the API says now
* POST   /lab/v1/shutdown              end the lab
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from podwire.lab import verify
from podwire.lab.errors import LabError
from podwire.lab.faults import Fault
from podwire.lab.paths import probe_paths
from podwire.lab.report import document
from podwire.lab.spec import LAB_MODES
from podwire.model.errors import InvalidInput, Unsupported
from podwire.model.proxymode import ProxyMode

if TYPE_CHECKING:
    from podwire.lab.cluster import LabCluster


def add_routes(app: web.Application, cluster: "LabCluster") -> None:
    """Serve the lab's own requests on the API server's application, before it starts."""
    control = _Control(cluster)
    app.router.add_get("/lab/v1/status", control.status)
    app.router.add_post("/lab/v1/nodes", control.add_node)
    app.router.add_delete("/lab/v1/nodes/{node}", control.remove_node)
    app.router.add_post("/lab/v1/nodes/{node}/restart", control.restart_node)
    app.router.add_post("/lab/v1/nodes/{node}/proxy-mode", control.proxy_mode)
    app.router.add_delete("/lab/v1/nodes/{node}/{what}", control.damage)
    app.router.add_get("/lab/v1/faults", control.faults)
    app.router.add_post("/lab/v1/faults", control.add_fault)
    app.router.add_delete("/lab/v1/faults", control.heal)
    app.router.add_post("/lab/v1/paths", control.paths)
    app.router.add_post("/lab/v1/verify/overlay", control.verify_overlay)
    app.router.add_post("/lab/v1/settle", control.settle)
    app.router.add_post("/lab/v1/shutdown", control.shutdown)


T = TypeVar("T")

_SETTLE_SECONDS = 25.0


class _Control:
    def __init__(self, cluster: "LabCluster") -> None:
        self._cluster = cluster
        self._changes: set[asyncio.Task[Any]] = set()

    async def status(self, request: web.Request) -> web.Response:
        return _json(self._cluster.status())

    async def add_node(self, request: web.Request) -> web.Response:
        return _json({"name": await self._to_the_end(self._cluster.add_node())})

    async def remove_node(self, request: web.Request) -> web.Response:
        await self._to_the_end(self._cluster.remove_node(request.match_info["node"]))
        return _json({})

    async def restart_node(self, request: web.Request) -> web.Response:
        await self._to_the_end(self._cluster.restart_node(request.match_info["node"]))
        return _json({})

    async def proxy_mode(self, request: web.Request) -> web.Response:
        wanted = request.query.get("mode", "")
        if wanted not in LAB_MODES:
            raise InvalidInput(f"proxy mode {wanted!r} cannot be used in a lab: take {' or '.join(LAB_MODES)}")
        await self._to_the_end(self._cluster.set_proxy_mode(request.match_info["node"], ProxyMode(wanted)))
        return _json({})

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """A change that was begun is finished, also when its asker has gone: a node is never left half made."""
        task = asyncio.create_task(_asked(work))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def faults(self, request: web.Request) -> web.Response:
        return _json([fault.to_json() | {"text": str(fault)} for fault in self._cluster.faults.active])

    async def add_fault(self, request: web.Request) -> web.Response:
        try:
            document = msgspec.json.decode(await request.read(), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise InvalidInput(f"the fault is no JSON object: {error}") from error
        fault = Fault.from_json(document)
        await _asked(self._cluster.faults.add(fault))
        return _json({"text": str(fault)})

    async def heal(self, request: web.Request) -> web.Response:
        return _json({"healed": await _asked(self._cluster.faults.heal(request.query.getall("place", [])))})

    async def damage(self, request: web.Request) -> web.Response:
        node, what = request.match_info["node"], request.match_info["what"]
        return _json({"removed": await _asked(self._cluster.faults.remove(node, what))})

    async def paths(self, request: web.Request) -> web.Response:
        results = await probe_paths(self._cluster, request.query.get("pod", ""), request.query.get("to", ""))
        return _json(document(results))

    async def verify_overlay(self, request: web.Request) -> web.Response:
        return _json(verify.document(await verify.verify_overlay(self._cluster)))

    async def settle(self, request: web.Request) -> web.Response:
        await _asked(self._cluster.settle(_seconds(request.query.get("within", ""))))
        return _json({})

    async def shutdown(self, request: web.Request) -> web.Response:
        self._cluster.request_stop()
        return _json({})


async def _asked(work: Awaitable[T]) -> T:
    """A LabError here is the asker's to hear, as the API's errors are."""
    try:
        return await work
    except (LabError, Unsupported) as error:
        raise InvalidInput(str(error)) from error


def _seconds(text: str) -> float:
    try:
        return min(max(float(text or _SETTLE_SECONDS), 0.0), 3600.0)
    except ValueError as error:
        raise InvalidInput(f"within={text} is no number of seconds") from error


def _json(content: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), content_type="application/json")
