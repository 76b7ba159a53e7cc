"""What a proxy serves over HTTP: /healthz, /livez, /proxyMode, /metrics, with kube-proxy's answers."""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from aiohttp import web

from podwire.agent.exposition import CONTENT_TYPE
from podwire.kernel.port import KernelError


@dataclass(frozen=True, slots=True)
class ProxyHealth:
    """A proxy at one moment. `healthy`: rules are right, or have been wrong for a short while only. `eligible`: balancers may
    send connections to this node. `updated`: when rules were last right; `why`: what is wrong, in words."""

    healthy: bool
    eligible: bool
    updated: datetime | None
    why: str = ""


def health_app(
    health: Callable[[], ProxyHealth], now: Callable[[], datetime], healthz: Counter[int], livez: Counter[int]
) -> web.Application:
    """/healthz is for balancers: 503 also when the node is about to go. /livez is for whoever would restart the proxy."""

    def answer(seen: ProxyHealth, good: bool, counts: Counter[int]) -> web.Response:
        body = {"lastUpdated": _go_time(seen.updated or now()), "currentTime": _go_time(now()), "nodeEligible": seen.eligible}
        if seen.why:
            body["reason"] = seen.why
        status = 200 if good else 503
        counts[status] += 1
        return web.json_response(body, status=status, headers={"X-Content-Type-Options": "nosniff"})

    async def on_healthz(_: web.Request) -> web.Response:
        seen = health()
        return answer(seen, seen.healthy and seen.eligible, healthz)

    async def on_livez(_: web.Request) -> web.Response:
        seen = health()
        return answer(seen, seen.healthy, livez)

    app = web.Application()
    app.add_routes([web.get("/healthz", on_healthz), web.get("/livez", on_livez)])
    return app


def metrics_app(
    mode: Callable[[], str],
    metrics: Callable[[], Awaitable[str]],
    endpoints: Callable[[], Awaitable[str]],
    healthz: Callable[[], bool],
) -> web.Application:
    """/proxyMode, /metrics, and /metrics/endpoints: a series for each endpoint, which most would not want to store."""

    async def on_mode(_: web.Request) -> web.Response:
        return web.Response(text=mode())

    async def on_healthz(_: web.Request) -> web.Response:
        good = healthz()
        return web.Response(status=200 if good else 503, text="ok" if good else "not healthy")

    def exposed(make: Callable[[], Awaitable[str]]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handler(_: web.Request) -> web.Response:
            try:
                text = await make()
            except KernelError as error:
                return web.Response(status=503, text=f"{error}\n")
            return web.Response(text=text, headers={"Content-Type": CONTENT_TYPE})

        return handler

    app = web.Application()
    app.add_routes(
        [
            web.get("/proxyMode", on_mode),
            web.get("/healthz", on_healthz),
            web.get("/metrics", exposed(metrics)),
            web.get("/metrics/endpoints", exposed(endpoints)),
        ]
    )
    return app


def _go_time(moment: datetime) -> str:
    """As Go prints a time.Time, which is what kube-proxy's body holds."""
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f +0000 UTC")
