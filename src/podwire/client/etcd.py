"""etcd, through the JSON gateway that every etcd since 3.4 serves on its client port (docs/decisions: no gRPC library needed).

    async with EtcdClient(["https://10.0.0.1:2379", "https://10.0.0.2:2379"], tls=etcd_tls(ca, cert, key)) as etcd:
        page = await etcd.read("subnets/", prefix=True)
        async with aclosing(etcd.watch("subnets/", prefix=True, start_revision=page.header.revision + 1)) as changes:
            async for change in changes: ...

The gateway is its own gRPC client of its member, so a user name cannot come from the client's certificate: with etcd's
authentication switched on, say user and password.
"""

import asyncio
import logging
import ssl as ssl_module
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from podwire.client.etcdmessages import (
    Compare,
    DeleteKeys,
    DeleteResponse,
    EtcdCompacted,
    EtcdDenied,
    EtcdError,
    EtcdKeyValue,
    EtcdUnavailable,
    LeaseResponse,
    Operation,
    PutKey,
    PutResponse,
    RangeResponse,
    ReadKeys,
    StatusResponse,
    TxnResponse,
    WatchResponse,
    error_from,
    operation_document,
)
from podwire.client.reasons import why_no_answer
from podwire.client.sockets import SocketFactory, open_socket
from podwire.model.errors import InvalidInput

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

DEFAULT_TIMEOUT = 5.0
"""Seconds for one attempt at one endpoint. etcd itself gives up on a proposal after 5 s and two election time-outs."""


class _Token(msgspec.Struct):
    token: str = ""


class _StreamItem(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: Any = None


_WATCH = msgspec.json.Decoder(WatchResponse, strict=False)
_ITEM = msgspec.json.Decoder(_StreamItem, strict=False)


def etcd_tls(cafile: str | Path = "", certfile: str | Path = "", keyfile: str | Path = "") -> ssl_module.SSLContext:
    """A TLS context: `cafile` checks the server (empty: the machine's own roots), the other two are this client's, together
    or not at all. Raises InvalidInput that names the file."""
    if bool(certfile) != bool(keyfile):
        raise InvalidInput(
            f"etcd: {certfile or keyfile} is only half of a client's identity: give certificate and key together"
        )
    try:
        context = ssl_module.create_default_context(cafile=str(cafile) or None)
    except (OSError, ssl_module.SSLError) as error:
        raise InvalidInput(f"etcd: {cafile} cannot be read as a file of CA certificates: {error}") from error
    if certfile:
        try:
            context.load_cert_chain(certfile, keyfile)
        except (OSError, ssl_module.SSLError) as error:
            raise InvalidInput(f"etcd: {certfile} and {keyfile} cannot be read as certificate and key: {error}") from error
    return context


class EtcdClient:
    """A connection pool to the members at `endpoints` (`http://host:port`, `https://…`), of which one is asked at a time.

    What fails before it was sent, and every read, is tried at each of the others; a write whose outcome is unknown is not
    sent again but raised as EtcdUnavailable with `sent`. All methods raise EtcdError and its branches.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: ssl_module.SSLContext | None = None,
        user: tuple[str, str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        socket_factory: SocketFactory = open_socket,
    ) -> None:
        """`user` is name and password. Raises InvalidInput for endpoints that are no URLs of etcd's kind."""
        self.endpoints = tuple(endpoint.strip().rstrip("/") for endpoint in endpoints)
        if not self.endpoints or not all(e.startswith(("http://", "https://")) for e in self.endpoints):
            raise InvalidInput(
                f"etcd endpoints {','.join(endpoints)!r}: give http://host:port or https://host:port, several with commas"
            )
        self._tls, self._user = tls, user
        self._timeout = timeout
        self._socket_factory = socket_factory
        self._session: aiohttp.ClientSession | None = None
        self._current = 0
        self._token = ""
        self._authenticating = asyncio.Lock()

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

    # --- keys -----------------------------------------------------------------------------------------------------

    async def get(self, key: str) -> EtcdKeyValue | None:
        """The key as it is now (a linearizable read)."""
        page = await self.range(ReadKeys(key=key))
        return page.kvs[0] if page.kvs else None

    async def read(self, key: str, *, prefix: bool = False, limit: int = 0, revision: int = 0) -> RangeResponse:
        """A key, or all keys that begin with it. Raises EtcdCompacted or EtcdFutureRevision where `revision` cannot be had."""
        return await self.range(ReadKeys(key=key, prefix=prefix, limit=limit, revision=revision))

    async def range(self, request: ReadKeys) -> RangeResponse:
        return await self._call("kv/range", request.document(), RangeResponse, again=True)

    async def put(self, key: str, value: bytes, lease: int = 0) -> PutResponse:
        return await self._call("kv/put", PutKey(key, value, lease).document(), PutResponse)

    async def delete(self, key: str, *, prefix: bool = False) -> DeleteResponse:
        return await self._call("kv/deleterange", DeleteKeys(key, prefix).document(), DeleteResponse)

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResponse:
        """If all of `compare` hold, `success` is done, else `failure`: in one revision, or (only reads) none."""
        document = {
            "compare": [comparison.document() for comparison in compare],
            "success": [operation_document(operation) for operation in success],
            "failure": [operation_document(operation) for operation in failure],
        }
        only_reads = all(isinstance(operation, ReadKeys) for operation in (*success, *failure))
        return await self._call("kv/txn", document, TxnResponse, again=only_reads)

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`. Raises EtcdCompacted where that has happened, EtcdFutureRevision."""
        await self._call("kv/compaction", {"revision": revision}, PutResponse)

    # --- leases ---------------------------------------------------------------------------------------------------

    async def grant(self, ttl: int) -> LeaseResponse:
        """A new lease of `ttl` seconds. (Tried again freely: one that nobody knows expires by itself.)"""
        return await self._call("lease/grant", {"TTL": ttl}, LeaseResponse, again=True)

    async def keep_alive(self, lease: int) -> int:
        """Give the lease its whole time again; returns that, in seconds. Raises EtcdLeaseNotFound."""
        data = await self._send("lease/keepalive", {"ID": lease}, again=True)
        try:
            item = _ITEM.decode(data)
            answer = msgspec.json.decode(item.result, type=LeaseResponse, strict=False)
        except msgspec.DecodeError as error:
            raise _garbled(self.endpoint, data) from error
        if item.error is not None:
            raise error_from({"error": item.error}, 500, self.endpoint)
        if answer.ttl <= 0:
            raise error_from({"message": "etcdserver: requested lease not found", "code": 5}, 404, self.endpoint)
        return answer.ttl

    async def time_to_live(self, lease: int) -> LeaseResponse:
        """What is left of the lease and which keys it holds; `ttl` ≤ 0 where it has gone."""
        return await self._call("lease/timetolive", {"ID": lease, "keys": True}, LeaseResponse, again=True)

    async def revoke(self, lease: int) -> None:
        """End the lease and delete its keys. Raises EtcdLeaseNotFound."""
        await self._call("lease/revoke", {"ID": lease}, PutResponse)

    # --- watching -------------------------------------------------------------------------------------------------

    async def watch(
        self, key: str, *, prefix: bool = False, start_revision: int = 0, prev_kv: bool = False
    ) -> AsyncGenerator[WatchResponse, None]:
        """Changes of a key, or of all that begin with it, at `start_revision` (0: from now) and later, until cancelled.

        The first item has `created` and no events: from then on nothing is missed. A member that loses its leader ends the
        watch. Close the iterator (`contextlib.aclosing`). Raises EtcdCompacted, EtcdUnavailable (watch again from the
        revision after the last one seen; the next call asks the next endpoint), EtcdDenied.
        """
        request: dict[str, Any] = ReadKeys(key=key, prefix=prefix).document() | {"progress_notify": True}
        if start_revision:
            request["start_revision"] = start_revision
        if prev_kv:
            request["prev_kv"] = True
        await self._authenticate()
        try:
            async for response in self._watch_at(self.endpoint, {"create_request": request}):
                yield response
        except EtcdUnavailable:
            self._next_endpoint(self.endpoint)
            raise
        except EtcdDenied:
            self._token = ""
            raise

    async def _watch_at(self, endpoint: str, request: dict[str, Any]) -> AsyncGenerator[WatchResponse, None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=None)
        headers = self._headers() | {"Grpc-Metadata-hasleader": "true"}
        rest = b""
        try:
            async with asyncio.timeout(self._timeout):  # who accepts a connection and says nothing is not there either
                response = await self._open().post(
                    f"{endpoint}/v3/watch", data=msgspec.json.encode(request), headers=headers, timeout=timeout
                )
            async with response:
                if response.status >= 400:
                    raise _refusal(await response.read(), response.status, endpoint)
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield _watch_item(line, endpoint)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _no_answer(endpoint, error, sent=True) from error
        raise EtcdUnavailable("the watch has ended", f"etcd at {endpoint} ended a watch", sent=False)

    # --- the cluster ----------------------------------------------------------------------------------------------

    async def status(self) -> StatusResponse:
        """Of the member that is asked at present."""
        return await self._call("maintenance/status", {}, StatusResponse, again=True)

    @property
    def endpoint(self) -> str:
        """The member that is asked at present."""
        return self.endpoints[self._current]

    async def call(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        """Any other method of the gateway, such as `auth/user/add`, as plain documents."""
        answer: dict[str, Any] = msgspec.json.decode(await self._send(path, document, again=False))
        return answer

    # --- inside ---------------------------------------------------------------------------------------------------

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0, ssl=self._tls if self._tls is not None else True, socket_factory=self._socket_factory
            )
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token} if self._token else {}

    async def _call(self, path: str, document: dict[str, Any], type: type[T], *, again: bool = False) -> T:
        data = await self._send(path, document, again=again)
        try:
            return msgspec.json.decode(data, type=type, strict=False)
        except msgspec.DecodeError as error:
            raise _garbled(self.endpoint, data) from error

    async def _send(self, path: str, document: dict[str, Any], *, again: bool) -> bytes:
        """`again`: doing it twice does no harm."""
        body = msgspec.json.encode(document)
        refreshed = False
        attempts = len(self.endpoints)
        while True:
            endpoint = self.endpoint
            try:
                await self._authenticate()
                return await self._once(endpoint, path, body)
            except EtcdDenied:
                if self._user is None or not self._token or refreshed:
                    raise
                self._token, refreshed = "", True  # it expired, or the members' passwords changed
            except EtcdUnavailable as error:
                self._next_endpoint(endpoint)
                attempts -= 1
                if not attempts or (error.sent and not again):
                    raise

    async def _once(self, endpoint: str, path: str, body: bytes) -> bytes:
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        try:
            async with self._open().post(
                f"{endpoint}/v3/{path}", data=body, headers=self._headers(), timeout=timeout
            ) as response:
                data = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise _no_answer(endpoint, error, sent=False) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _no_answer(endpoint, error, sent=True) from error
        if response.status >= 400:
            raise _refusal(data, response.status, endpoint)
        return data

    async def _authenticate(self) -> None:
        async with self._authenticating:
            if self._user is None or self._token:
                return
            name, password = self._user
            body = msgspec.json.encode({"name": name, "password": password})
            try:
                data = await self._once(self.endpoint, "auth/authenticate", body)
            except EtcdUnavailable as error:
                raise EtcdUnavailable(error.reason, str(error), sent=False) from error
            except EtcdError as error:
                if "authentication is not enabled" in error.reason:
                    log.warning("etcd does not ask for a user: %s is not needed", name)
                    self._user = None
                    return
                raise EtcdDenied(error.code, error.reason, f"{error} (user {name})") from error
            self._token = msgspec.json.decode(data, type=_Token).token

    def _next_endpoint(self, failed: str) -> None:
        """Ask another from now on, unless somebody has already chosen one."""
        if self.endpoint == failed:
            self._current = (self._current + 1) % len(self.endpoints)


def _watch_item(line: bytes, endpoint: str) -> WatchResponse:
    try:
        item = _ITEM.decode(line)
        if item.error is None:
            response = _WATCH.decode(item.result)
    except msgspec.DecodeError as error:
        raise _garbled(endpoint, line) from error
    if item.error is not None:
        raise error_from({"error": item.error}, 500, endpoint)
    if response.compact_revision:
        raise EtcdCompacted("the watched revision has been compacted", response.compact_revision)
    if response.canceled:
        reason = response.cancel_reason or "the watch was cancelled"
        code = 7 if "permission" in reason else 14
        raise error_from({"message": reason, "code": code}, 500, endpoint)
    return response


def _refusal(data: bytes, status: int, endpoint: str) -> EtcdError:
    try:
        document = msgspec.json.decode(data)
    except msgspec.DecodeError:
        document = None
    return error_from(document if isinstance(document, dict) else None, status, endpoint)


def _no_answer(endpoint: str, error: Exception, *, sent: bool) -> EtcdUnavailable:
    words = why_no_answer(error)
    return EtcdUnavailable(words, f"etcd at {endpoint} did not answer ({words})", sent=sent)


def _garbled(endpoint: str, data: bytes) -> EtcdError:
    return EtcdError(2, "not etcd's JSON", f"{endpoint} does not answer as etcd does: {data[:80]!r}")
