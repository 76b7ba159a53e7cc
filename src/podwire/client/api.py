"""One client for any API server: requests in, JSON documents and typed errors out. Knows no kind beyond its `Resource`."""

import asyncio
import enum
import http
import ssl as ssl_module
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import msgspec

from podwire.client.errors import ApiError, Gone, TooManyRequests, Unavailable, error_from_status
from podwire.client.reasons import why_no_answer
from podwire.client.servers import Servers, never_sent
from podwire.client.sockets import SocketFactory, open_socket
from podwire.model.meta import Json
from podwire.model.resources import Resource

PAGE_SIZE = 500
REQUEST_TIMEOUT = 30.0
FAILED = "<error>"
"""In the place of a status: there was no answer."""
WATCH_SLACK = 30.0
"""Seconds beyond a watch's own time-out after which a silent connection counts as dead."""


class PatchKind(enum.Enum):
    """How a PATCH body is meant; `.value` is its media type."""

    JSON = "application/json-patch+json"
    MERGE = "application/merge-patch+json"
    STRATEGIC = "application/strategic-merge-patch+json"
    APPLY = "application/apply-patch+yaml"


@dataclass(frozen=True, slots=True)
class ObjectList:
    """All objects of a list request, pages joined, and the revision to watch from."""

    items: list[Json]
    resource_version: str


class WatchEvent(msgspec.Struct, frozen=True):
    """One event of a watch. `type` is ADDED, MODIFIED, DELETED or BOOKMARK (ERROR is raised).

    `object` stays encoded until asked for.
    """

    type: str
    object: msgspec.Raw

    def json(self) -> Json:
        document: Json = msgspec.json.decode(self.object)
        return document


class ListMeta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


RawItems = list[msgspec.Raw]


class RawList(msgspec.Struct, frozen=True):
    """A list response whose items are still encoded."""

    metadata: ListMeta = ListMeta()
    items: RawItems | None = None


_event_decoder = msgspec.json.Decoder(WatchEvent)
_list_decoder = msgspec.json.Decoder(RawList)


class Asked(NamedTuple):
    """A request that was answered, or failed (`code` is "<error>", client-go's word). `seconds`: to the answer's end; None for
    a stream."""

    method: str
    host: str
    code: str
    seconds: float | None


class ApiClient:
    """A connection pool to one API server, or to several of one cluster. `async with ApiClient(…) as client:`, or `close()`
    at the end.

    `base_url` is `https://host:port` (or `http://…`); with `unix_socket` (a path, or an abstract name starting with NUL) its
    host is only a name. `token` that is callable is asked before each request: tokens of accounts are replaced within the hour.

    Of several servers, one is used until it fails (no connection, no answer in time, 503). What cannot have reached it, or only
    reads, is asked of the next at once; other requests and streams fail with Unavailable, and go to the next when made again.
    All methods raise `ApiError` and its branches.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        token: str | Callable[[], str] | None = None,
        ssl: ssl_module.SSLContext | None = None,
        unix_socket: str | None = None,
        user_agent: str = "podwire",
        socket_factory: SocketFactory = open_socket,
    ) -> None:
        self._servers = Servers(base_url)
        self._headers = {"Accept": "application/json", "User-Agent": user_agent}
        self._token = token
        self.tls = ssl
        self._unix_socket = unix_socket
        self._socket_factory = socket_factory
        self._session: aiohttp.ClientSession | None = None
        self._flows: set[tuple[str, aiohttp.StreamReader]] = set()
        """The streams that are being read, by server."""
        self._observers: list[Callable[[Asked], None]] = []

    @property
    def base_url(self) -> str:
        """Of the server in use."""
        return self._servers.current

    def subscribe(self, observer: Callable[[Asked], None]) -> None:
        """Be told of every request from now on."""
        self._observers.append(observer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # --- requests -------------------------------------------------------------------------------------------------

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> bytes:
        """One request; returns the response body. `body` is bytes as they are, or a document to encode as JSON.

        A 429 with Retry-After is waited out (a few times) before it is raised.
        """
        data = None if body is None else body if isinstance(body, bytes) else msgspec.json.encode(body)
        for _ in range(4):
            try:
                return await self._once(method, path, params or {}, data, {"Content-Type": content_type, "Accept": accept})
            except TooManyRequests as busy:
                if not busy.retry_after:
                    raise
                await asyncio.sleep(min(busy.retry_after, 10.0))
        return await self._once(method, path, params or {}, data, {"Content-Type": content_type, "Accept": accept})

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Json:
        return _document(await self.request("GET", resource.path(namespace, name)))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = PAGE_SIZE,
    ) -> ObjectList:
        """All matching objects, `limit` at a time on the wire (0: in one piece). Items carry apiVersion and kind."""
        raw = await self.list_raw(
            resource, namespace, label_selector=label_selector, field_selector=field_selector, limit=limit
        )
        head = {"apiVersion": resource.api_version, "kind": resource.kind}
        items = [head | _document(item) for item in raw.items or ()]
        return ObjectList(items, raw.metadata.resource_version)

    async def list_raw(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = PAGE_SIZE,
        at: str = "",
    ) -> RawList:
        """As `list`, items still encoded. A continue token that expired on the way starts the list again in one piece.

        at: as it was at that resourceVersion; raises Gone where that is longer ago than the server remembers."""
        params = _selectors(label_selector, field_selector)
        moment = {"resourceVersion": at, "resourceVersionMatch": "Exact"} if at else {}
        params |= moment
        if limit:
            params["limit"] = str(limit)
        path = resource.path(namespace)
        items: RawItems = []
        while True:
            try:
                page = _list_decoder.decode(await self.request("GET", path, params=params))
            except msgspec.DecodeError as error:
                raise self._not_an_api_server(path, error) from error
            except Gone:
                if "continue" not in params:
                    raise
                params.pop("continue"), params.pop("limit")
                params |= moment
                items = []
                continue
            items.extend(page.items or ())
            if not page.metadata.continue_:
                return RawList(page.metadata, items)
            params["continue"] = page.metadata.continue_
            for name in moment:  # the token says it
                params.pop(name, None)

    async def create(
        self, resource: Resource, obj: Mapping[str, Any], namespace: str | None = None, *, subresource: str = ""
    ) -> Json:
        """POST to the collection, or (with `subresource`: binding, eviction, …) to that part of the object named in `obj`."""
        meta = obj.get("metadata", {})
        path = resource.path(namespace or meta.get("namespace"), meta.get("name") if subresource else None, subresource)
        return _document(await self.request("POST", path, body=obj))

    async def replace(self, resource: Resource, obj: Mapping[str, Any], *, subresource: str = "") -> Json:
        """PUT the whole document; its metadata says where. A resourceVersion in it makes the write conditional."""
        meta = obj["metadata"]
        path = resource.path(meta.get("namespace"), meta["name"], subresource)
        return _document(await self.request("PUT", path, body=obj))

    async def patch(
        self,
        resource: Resource,
        name: str,
        patch: object,
        namespace: str | None = None,
        *,
        subresource: str = "",
        kind: PatchKind = PatchKind.MERGE,
        field_manager: str = "",
        force: bool = False,
    ) -> Json:
        """`field_manager` and `force` matter to PatchKind.APPLY (server-side apply) only."""
        params = {"fieldManager": field_manager} if field_manager else {}
        if force:
            params["force"] = "true"
        path = resource.path(namespace, name, subresource)
        return _document(await self.request("PATCH", path, params=params, body=patch, content_type=kind.value))

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        grace_period_seconds: int | None = None,
        uid: str | None = None,
        propagation: str | None = None,
    ) -> Json:
        """`propagation` is Background, Foreground or Orphan. With `uid`, another object of the same name is a Conflict."""
        options: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace_period_seconds is not None:
            options["gracePeriodSeconds"] = grace_period_seconds
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if propagation is not None:
            options["propagationPolicy"] = propagation
        return _document(await self.request("DELETE", resource.path(namespace, name), body=options))

    # --- streams --------------------------------------------------------------------------------------------------

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str = "",
        label_selector: str = "",
        field_selector: str = "",
        allow_bookmarks: bool = True,
        timeout_seconds: int = 300,
    ) -> AsyncGenerator[WatchEvent, None]:
        """Events after `resource_version`, until the server ends the watch. Close the iterator (`contextlib.aclosing`).

        Raises Gone where the revision is too old, Unavailable where the connection breaks.
        """
        params = _selectors(label_selector, field_selector)
        params |= {"watch": "true", "timeoutSeconds": str(timeout_seconds)}
        if resource_version:
            params["resourceVersion"] = resource_version
        if allow_bookmarks:
            params["allowWatchBookmarks"] = "true"
        path, rest = resource.path(namespace), b""
        # The other end of a Unix socket cannot vanish unnoticed, and a timer per chunk would cost more than the chunk.
        silence = None if self._unix_socket is not None else timeout_seconds + WATCH_SLACK
        async with aclosing(self.stream("GET", path, params=params, silence=silence)) as chunks:
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    try:
                        event = _event_decoder.decode(line)
                    except msgspec.DecodeError as error:
                        raise self._not_an_api_server(path, error) from error
                    if event.type == "ERROR":
                        raise error_from_status(bytes(event.object), 500, f"WATCH {path}")
                    yield event

    async def stream(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None, silence: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        """A response body as it comes. More than `silence` seconds without a byte count as a broken connection."""
        server, answered = self.base_url, False
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._servers.connect_seconds, sock_read=silence)
        try:
            async with self._open().request(
                method, server + path, params=params, headers=self._identified(), timeout=timeout
            ) as response:
                answered = True
                self._tell(method, server, str(response.status), None)
                if response.status >= 400:
                    raise self._refused(server, response, await response.read(), f"{method} {path}")
                flow = (server, response.content)
                self._flows.add(flow)
                try:
                    async for chunk in response.content.iter_any():
                        yield chunk
                finally:
                    self._flows.discard(flow)
        except aiohttp.ClientPayloadError as error:
            self._servers.failed(server, "broke the connection off")
            raise Unavailable(f"{self._where(server)} broke the connection off") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if not answered:
                self._tell(method, server, FAILED, None)
            raise self._failed(server, error) from error

    async def websocket(
        self, path: str, *, params: Sequence[tuple[str, str]], protocols: tuple[str, ...]
    ) -> aiohttp.ClientWebSocketResponse:
        """An open WebSocket to e.g. `/api/v1/namespaces/n/pods/p/exec`; the caller closes it."""
        server = self.base_url
        try:
            return await self._open().ws_connect(
                server + path, params=params, protocols=protocols, headers=self._identified(), max_msg_size=0
            )
        except aiohttp.WSServerHandshakeError as error:
            raise error_from_status(error.message.encode(), error.status, f"GET {path}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._failed(server, error) from error

    # --- inside ---------------------------------------------------------------------------------------------------

    def _open(self) -> aiohttp.ClientSession:
        """The session, made on first use: aiohttp wants a running loop for it."""
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self._unix_socket is not None:
                connector = aiohttp.UnixConnector(path=self._unix_socket, limit=0)
            else:
                # A watch holds its connection for minutes, so the pool must not be bounded.
                tls = self.tls if self.tls is not None else True
                connector = aiohttp.TCPConnector(limit=0, ssl=tls, socket_factory=self._socket_factory)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=True)
        return self._session

    async def _once(
        self, method: str, path: str, params: Mapping[str, str], data: bytes | None, headers: dict[str, str]
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT, sock_connect=self._servers.connect_seconds)
        headers = self._identified() | headers
        if data is None:
            headers.pop("Content-Type")
        others = len(self._servers.urls) - 1
        while True:
            server, began = self.base_url, asyncio.get_running_loop().time()
            try:
                async with self._open().request(
                    method, server + path, params=params, data=data, headers=headers, timeout=timeout
                ) as response:
                    body = await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._tell(method, server, FAILED, began)
                failure = self._failed(server, error)
                again = never_sent(error) or (method == "GET" and not isinstance(error, TimeoutError))
                if not others or not again:
                    raise failure from error
                others -= 1
                continue
            self._tell(method, server, str(response.status), began)
            if response.status < 400:
                return body
            raise self._refused(server, response, body, f"{method} {path}")

    def _tell(self, method: str, server: str, code: str, began: float | None) -> None:
        """Of a request that began then (loop time), or that is a stream."""
        seconds = None if began is None else asyncio.get_running_loop().time() - began
        for observer in self._observers:
            observer(Asked(method, server.partition("://")[2].partition("/")[0], code, seconds))

    def _identified(self) -> dict[str, str]:
        token = self._token() if callable(self._token) else self._token
        return self._headers | {"Authorization": f"Bearer {token}"} if token else self._headers

    def _failed(self, server: str, error: Exception) -> Unavailable:
        """Go on with the next server, if there is one. Of one that keeps its connections and says nothing, no stream can be
        expected to say anything either: all are broken off."""
        why = why_no_answer(error)
        changed = self._servers.failed(server, why)
        if changed and isinstance(error, TimeoutError) and not never_sent(error):
            for source, content in tuple(self._flows):
                if source == server:
                    content.set_exception(aiohttp.ClientPayloadError(why))
        return Unavailable(f"{self._where(server)} did not answer ({why})")

    def _refused(self, server: str, response: aiohttp.ClientResponse, body: bytes, what: str) -> ApiError:
        failure = error_from_status(body, response.status, what)
        retry_after = response.headers.get("Retry-After", "")
        if retry_after.isdigit() and not failure.retry_after:
            failure.details = {**failure.details, "retryAfterSeconds": int(retry_after)}
        if response.status == http.HTTPStatus.SERVICE_UNAVAILABLE:
            self._servers.failed(server, failure)
        return failure

    def _not_an_api_server(self, path: str, error: Exception) -> Unavailable:
        """Something on the way that answers in its stead, a balancer with nobody behind it say."""
        return Unavailable(f"{self._where(self.base_url)} answered {path} with what is not of the Kubernetes API ({error})")

    def _where(self, server: str) -> str:
        return f"the API server at {server if self._unix_socket is None else f'Unix socket {self._unix_socket!r}'}"


def _document(data: bytes | msgspec.Raw) -> Json:
    document: Json = msgspec.json.decode(data)
    return document


def _selectors(label_selector: str, field_selector: str) -> dict[str, str]:
    params = {}
    if label_selector:
        params["labelSelector"] = label_selector
    if field_selector:
        params["fieldSelector"] = field_selector
    return params
