"""The node's HTTPS server (port 10250), with the part of kubelet's API that an API server proxies to: logs and exec."""

import hmac
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

from aiohttp import web

from podwire.model.meta import Json
from podwire.model.podruntime import PodReport
from podwire.runtime.execsession import PROTOCOLS, ExecOptions, ExecSession, failure
from podwire.runtime.logs import LogOptions, read_log
from podwire.runtime.pods import NodeRuntime
from podwire.runtime.shim.logfile import timestamp
from podwire.runtime.shim.messages import ContainerRecord, SandboxSpec

PORT = 10250

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class KubeletServer:
    """Serves one node's runtime to whoever bears `token`."""

    def __init__(self, runtime: NodeRuntime, token: str, *, clock: Callable[[], float] = time.time) -> None:
        self._runtime, self._token, self._now = runtime, token, clock
        self._runner: web.AppRunner | None = None

    async def start(self, sock: socket.socket, ssl_context: ssl.SSLContext | None) -> None:
        """Serve on a bound socket (which becomes ours), over TLS if there is a context."""
        app = web.Application(middlewares=[self._authenticate])
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/pods", self._pods)
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        app.router.add_get("/exec/{namespace}/{pod}/{container}", self._exec)
        # Cancellation: a follower that goes away while nothing is logged would otherwise stay for ever.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.SockSite(self._runner, sock, ssl_context=ssl_context).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token.encode())
        if not right and request.path != "/healthz":
            return _refuse(401, "Unauthorized", "Unauthorized")
        return await handler(request)

    async def _healthz(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text="ok")

    async def _pods(self, _: web.Request) -> web.StreamResponse:
        items = [_pod_document(spec, report) for spec, report in self._runtime.pods()]
        return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})

    def _run_of(self, request: web.Request, *, previous: bool = False) -> ContainerRecord | web.Response:
        """The container run that the path names, or the answer to give where there is none."""
        namespace, pod, container = (request.match_info[part] for part in ("namespace", "pod", "container"))
        try:
            record = self._runtime.run_of(namespace, pod, container, previous=previous)
        except KeyError:
            return _refuse(404, "NotFound", f'pod "{pod}" does not run on node "{self._runtime.node_name}"')
        if record is None and previous:
            return _refuse(400, "BadRequest", f'previous terminated container "{container}" in pod "{pod}" not found')
        if record is not None:
            return record
        reason = self._runtime.waiting_reason(namespace, pod, container)
        if reason is None:
            return _refuse(400, "BadRequest", f'container "{container}" is not valid for pod "{pod}"')
        return _refuse(400, "BadRequest", f'container "{container}" in pod "{pod}" is waiting to start: {reason}')

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        try:
            options = self._log_options(request)
        except ValueError as error:
            return _refuse(400, "BadRequest", f"invalid log option: {error}")
        record = self._run_of(request, previous=_flag(request, "previous"))
        if isinstance(record, web.Response):
            return record
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        try:
            async for piece in self._read(record, options):
                await response.write(piece)
        except FileNotFoundError:
            await response.write(b"the log of this container is gone\n")
        await response.write_eof()
        return response

    def _read(self, record: ContainerRecord, options: LogOptions) -> AsyncIterator[bytes]:
        runtime = self._runtime
        return read_log(
            record.log,
            options,
            growth=lambda: runtime.client.log_growth(record),
            running=lambda: runtime.latest(record).running,
        )

    def _log_options(self, request: web.Request) -> LogOptions:
        since = ""
        if seconds := request.query.get("sinceSeconds"):
            since = timestamp(int((self._now() - int(seconds)) * 1e9))
        elif moment := request.query.get("sinceTime"):
            given = datetime.fromisoformat(moment)
            since = timestamp(int((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp() * 1e9))
        return LogOptions(
            follow=_flag(request, "follow"),
            timestamps=_flag(request, "timestamps"),
            tail_lines=_number(request, "tailLines"),
            limit_bytes=_number(request, "limitBytes"),
            since=since,
        )

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        options = ExecOptions(
            command=tuple(request.query.getall("command", [])),
            stdin=_flag(request, "stdin") or _flag(request, "input"),
            stdout=_flag(request, "stdout") or _flag(request, "output"),
            stderr=_flag(request, "stderr") or _flag(request, "error"),
            tty=_flag(request, "tty"),
        )
        if not options.command:
            return _refuse(400, "BadRequest", "you must specify at least 1 command for the container")
        record = self._run_of(request)
        if isinstance(record, web.Response):
            return record
        if not record.running:
            return _refuse(400, "BadRequest", f'container "{record.name}" is not running')
        socket_response = web.WebSocketResponse(protocols=PROTOCOLS)
        if not socket_response.can_prepare(request).ok:
            return _refuse(
                426, "UpgradeRequired", "exec needs a WebSocket (v5.channel.k8s.io or v4.channel.k8s.io); SPDY is not spoken"
            )
        await socket_response.prepare(request)
        await ExecSession(self._runtime.client, record, socket_response, options).run()
        return socket_response


def _flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "").lower() in ("true", "1")


def _number(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if not text:
        return None
    number = int(text)
    if number < 0:
        raise ValueError(f"{name} must not be negative")
    return number


def _refuse(code: int, reason: str, message: str) -> web.Response:
    return web.json_response(failure(message, reason, code), status=code)


def _pod_document(spec: SandboxSpec, report: PodReport | None) -> Json:
    status: Json = {}
    if report is not None:
        status = {"phase": report.phase, "containerStatuses": list(report.container_statuses)}
    return {"metadata": {"name": spec.name, "namespace": spec.namespace, "uid": spec.uid}, "status": status}
