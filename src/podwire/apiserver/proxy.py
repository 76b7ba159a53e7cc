"""pods/log and pods/exec: passed on to the agent of the pod's node, which serves them as a kubelet does."""

import asyncio
import contextlib
import ipaddress
import logging
from dataclasses import dataclass, field

import aiohttp
import msgspec
from aiohttp import web

from podwire.apiserver import status
from podwire.apiserver.config import KubeletAccess
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.objects import Objects, Place
from podwire.apiserver.verbs import Call
from podwire.model.meta import Json
from podwire.model.resources import NODES

_log = logging.getLogger(__name__)

DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
KUBELET_PORT = 10250
CONNECT_SECONDS = 5.0
REFUSAL_SECONDS = 5.0
CHANNEL_PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
"""Kubernetes' remote command over WebSocket: one byte of channel number before the data."""

LOG_PARAMETERS = ("follow", "previous", "sinceSeconds", "sinceTime", "timestamps", "tailLines", "limitBytes", "stream")
EXEC_PARAMETERS = ("stdin", "stdout", "stderr", "tty")


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a container's log or exec is served."""

    url: str
    token: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


class NodeProxy:
    """Streams between clients and nodes. `close` it at the end."""

    def __init__(self, objects: Objects, access: KubeletAccess) -> None:
        self._objects, self._access = objects, access
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def log(self, call: Call) -> web.StreamResponse:
        """Raises StatusError; once the first byte is out, a broken connection to the node just ends the stream."""
        upstream = await self._upstream(call, "containerLogs")
        params = [(key, call.query[key]) for key in LOG_PARAMETERS if key in call.query]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with self._client().get(upstream.url, params=params, headers=upstream.headers, timeout=timeout) as answer:
                if answer.status != 200:
                    raise _refused(answer.status, await answer.text())
                return await _copy(call.request, answer)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(call, error) from error

    async def exec(self, call: Call) -> web.StreamResponse:
        """A WebSocket on either side, messages passed on as they are."""
        upstream = await self._upstream(call, "exec")
        params = [(key, value) for key, value in call.request.query.items() if key in (*EXEC_PARAMETERS, "command")]
        if call.request.headers.get("Upgrade", "").lower() != "websocket":
            # kubectl turns to SPDY when its WebSocket was refused, and shows the answer to that.
            spdy = status.bad_request("exec is served over WebSocket, not over SPDY: use kubectl 1.31 or newer")
            raise await self._refusal(upstream, params) or spdy
        offered = [p.strip() for p in call.request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        protocols = [p for p in offered if p in CHANNEL_PROTOCOLS]
        if not protocols:
            raise status.bad_request(f"exec: none of the protocols {offered} is known; offer {', '.join(CHANNEL_PROTOCOLS)}")
        try:
            far = await self._client().ws_connect(
                upstream.url, params=params, protocols=protocols, headers=upstream.headers, max_msg_size=0
            )
        except aiohttp.WSServerHandshakeError as error:
            raise await self._refusal(upstream, params) or _refused(error.status, error.message) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(call, error) from error
        async with far:
            near = web.WebSocketResponse(protocols=(far.protocol or protocols[0],), max_msg_size=0)
            await near.prepare(call.request)
            await _join(near, far)
            return near

    async def _refusal(self, upstream: Upstream, params: list[tuple[str, str]]) -> status.StatusError | None:
        """Why the node refuses an exec; None if all it wants is a WebSocket (426), or it does not answer.

        The WebSocket client drops the body of a refused handshake, so this asks again, without one."""
        timeout = aiohttp.ClientTimeout(total=REFUSAL_SECONDS)
        try:
            async with self._client().get(upstream.url, params=params, headers=upstream.headers, timeout=timeout) as answer:
                if answer.status == web.HTTPUpgradeRequired.status_code:
                    return None
                return _refused(answer.status, await answer.text())
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def _upstream(self, call: Call, endpoint: str) -> Upstream:
        pod = await self._objects.read(call.place)
        container = pick_container(pod, call.query.get("container", ""))
        name = (pod.get("spec") or {}).get("nodeName")
        if not name:
            raise status.bad_request(f"pod {call.target.name} does not have a host assigned")
        kind = REGISTRY.by_kind(NODES.api_version, NODES.kind)
        assert kind is not None
        node = await self._objects.read(Place(kind, "", name))
        scheme = "https" if self._access.tls else "http"
        path = f"{endpoint}/{call.target.namespace}/{call.target.name}/{container}"
        return Upstream(f"{scheme}://{node_endpoint(node)}/{path}", self._access.token_of(name))

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            tls = self._access.tls
            connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True, limit=0)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session


class _NodeStatus(msgspec.Struct):
    """What is read of a metav1.Status that a node answers with."""

    kind: str
    reason: str = ""
    message: str = ""


def pick_container(pod: Json, wanted: str) -> str:
    """The container meant: the one named, the only one, or the annotated default. Raises StatusError 400."""
    spec, meta = pod.get("spec") or {}, pod["metadata"]
    names = [str(c["name"]) for c in spec.get("containers") or ()]
    extra = [str(c["name"]) for key in ("initContainers", "ephemeralContainers") for c in spec.get(key) or ()]
    if wanted:
        if wanted not in names + extra:
            raise status.bad_request(f"container {wanted} is not valid for pod {meta['name']}")
        return wanted
    default = str((meta.get("annotations") or {}).get(DEFAULT_CONTAINER, ""))
    if default in names:
        return default
    if len(names) != 1:
        choice = f"choose one of: [{' '.join(names)}]" + (
            f" or one of the init containers: [{' '.join(extra)}]" if extra else ""
        )
        raise status.bad_request(f"a container name must be specified for pod {meta['name']}, {choice}")
    return names[0]


def node_endpoint(node: Json) -> str:
    """host:port of the node's agent. Raises StatusError 503 for a node without an address."""
    state = node.get("status") or {}
    port = ((state.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}).get("Port") or KUBELET_PORT
    for kind in ("InternalIP", "ExternalIP"):
        for entry in state.get("addresses") or ():
            if entry.get("type") == kind:
                address = ipaddress.ip_address(entry["address"])
                return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    raise status.unavailable(f"node {node['metadata']['name']} has no address yet")


async def _copy(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
    return response


async def _join(near: web.WebSocketResponse, far: aiohttp.ClientWebSocketResponse) -> None:
    """Pass messages both ways until either side closes, then close the other."""
    ways = {asyncio.create_task(_pass(near, far)), asyncio.create_task(_pass(far, near))}
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
    await far.close()
    await near.close()


_Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


async def _pass(source: _Socket, sink: _Socket) -> None:
    with contextlib.suppress(ConnectionError):
        async for message in source:
            if message.type is aiohttp.WSMsgType.BINARY:
                await sink.send_bytes(message.data)
            elif message.type is aiohttp.WSMsgType.TEXT:
                await sink.send_str(message.data)


def _refused(code: int, text: str) -> status.StatusError:
    """What the node said, in its own words: a Status document's message, or a text as it is (the kubelet's own refusals)."""
    reason = {400: "BadRequest", 403: "Forbidden", 404: "NotFound"}.get(code, "InternalError")
    message = text.strip()
    with contextlib.suppress(msgspec.MsgspecError):
        said = msgspec.json.decode(text, type=_NodeStatus)
        if said.kind == "Status":
            message = said.message
            reason = said.reason or reason
    message = message or f"the node answered {code}"
    # A 401 is between this server and the node: the client's own credentials are good.
    if code == 401:
        return status.StatusError(500, "InternalError", message)
    return status.StatusError(code, reason, message)


def _unreachable(call: Call, error: Exception) -> status.StatusError:
    _log.warning("the node of pod %s/%s cannot be reached: %s", call.target.namespace, call.target.name, error)
    return status.StatusError(
        502, "ServiceUnavailable", f"the node of pod {call.target.name} does not answer ({error or type(error).__name__})"
    )
