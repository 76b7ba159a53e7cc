"""/healthz, /readyz and /metrics of an overlay agent. Apart, since an agent that serves none need not hold aiohttp's server."""

from collections.abc import Callable

from aiohttp import web

from podwire.agent.exposition import CONTENT_TYPE
from podwire.agent.overlayd.status import OverlayStatus, metrics_text
from podwire.agent.process import process_text


def status_app(status: Callable[[], OverlayStatus]) -> web.Application:
    """/healthz: 200 as long as the agent runs (flanneld's). /readyz: 503 and the reasons while the node is not fully part of
    the overlay. /metrics: Prometheus' text format."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        obstacles = status().obstacles
        return web.Response(status=503 if obstacles else 200, text="".join(f"{line}\n" for line in obstacles or ("ok",)))

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=metrics_text(status()) + process_text(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    return app
