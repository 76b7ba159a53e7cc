"""etcd's v3 messages as values, its errors, and its JSON: bytes are base64, 64-bit numbers may be strings, zeros are left out.

EtcdError                     an answer that is no success; `code` is gRPC's
├── EtcdUnavailable (14, 4)   nobody answered, or who answered has no leader; `sent` says whether it may have taken effect
├── EtcdCompacted (11)        the wanted revision is no longer there
├── EtcdFutureRevision (11)   the wanted revision is not there yet
├── EtcdLeaseNotFound (5)     the lease has expired or was revoked
└── EtcdDenied (7, 16, …)     wrong or missing user, password or permission
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from podwire.model.errors import PodwireError


class EtcdError(PodwireError):
    """etcd refused. `code` is the gRPC status code, `reason` etcd's own words."""

    def __init__(self, code: int, reason: str, message: str = "") -> None:
        self.code, self.reason = code, reason
        super().__init__(message or reason)


class EtcdUnavailable(EtcdError):
    """No usable answer. `sent`: a write may have happened nevertheless; False where it surely did not."""

    def __init__(self, reason: str, message: str, *, sent: bool) -> None:
        self.sent = sent
        super().__init__(14, reason, message)


class EtcdCompacted(EtcdError):
    """Read again from the start. `oldest` is the oldest revision that can be had, 0 where etcd did not say."""

    def __init__(self, reason: str, oldest: int = 0) -> None:
        self.oldest = oldest
        super().__init__(11, reason)


class EtcdFutureRevision(EtcdError):
    pass


class EtcdLeaseNotFound(EtcdError):
    pass


class EtcdDenied(EtcdError):
    pass


# --- what comes ---------------------------------------------------------------------------------------------------------


class Header(msgspec.Struct, frozen=True):
    """Of every response: `revision` is the store's at that time."""

    revision: int = 0
    member_id: int = 0
    raft_term: int = 0


class EtcdKeyValue(msgspec.Struct, frozen=True, kw_only=True):
    """A key's state. `lease` 0: it does not expire. `version` counts its writes since it was made."""

    raw_key: bytes = msgspec.field(name="key", default=b"")
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0

    @property
    def key(self) -> str:
        return self.raw_key.decode(errors="surrogateescape")


KeyValues = tuple[EtcdKeyValue, ...]


class RangeResponse(msgspec.Struct, frozen=True):
    """Keys in order; `count` is how many there are in the range, `more` whether the limit cut them short."""

    header: Header = Header()
    kvs: KeyValues = ()
    more: bool = False
    count: int = 0


class PutResponse(msgspec.Struct, frozen=True):
    header: Header = Header()
    prev_kv: EtcdKeyValue | None = None


class DeleteResponse(msgspec.Struct, frozen=True):
    header: Header = Header()
    deleted: int = 0
    prev_kvs: KeyValues = ()


class OpResponse(msgspec.Struct, frozen=True):
    """The answer to one operation of a transaction: the field of its kind is set."""

    response_range: RangeResponse | None = None
    response_put: PutResponse | None = None
    response_delete_range: DeleteResponse | None = None


class TxnResponse(msgspec.Struct, frozen=True):
    """`succeeded`: all comparisons held and the first list of operations was done, otherwise the second."""

    header: Header = Header()
    succeeded: bool = False
    responses: tuple[OpResponse, ...] = ()


class LeaseResponse(msgspec.Struct, frozen=True):
    """`ttl` in seconds: as granted or remaining; ≤ 0 where there is no such lease (any more)."""

    header: Header = Header()
    id: int = msgspec.field(name="ID", default=0)
    ttl: int = msgspec.field(name="TTL", default=0)
    granted_ttl: int = msgspec.field(name="grantedTTL", default=0)
    keys: tuple[bytes, ...] = ()


class StatusResponse(msgspec.Struct, frozen=True):
    header: Header = Header()
    version: str = ""
    db_size: int = msgspec.field(name="dbSize", default=0)
    leader: int = 0


class EtcdEvent(msgspec.Struct, frozen=True):
    """One change. A deletion's `kv` has only the key and the revision; `prev_kv` is there where it was asked for and kept."""

    kv: EtcdKeyValue
    type: Literal["PUT", "DELETE"] = "PUT"
    prev_kv: EtcdKeyValue | None = None


class WatchResponse(msgspec.Struct, frozen=True):
    """Whole revisions' events, in order; without any it only says how far the watch has come (`header.revision`)."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: tuple[EtcdEvent, ...] = ()


# --- what is sent -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutKey:
    key: str
    value: bytes
    lease: int = 0

    def document(self) -> dict[str, Any]:
        return {"key": raw(self.key), "value": self.value} | ({"lease": self.lease} if self.lease else {})


@dataclass(frozen=True, slots=True)
class DeleteKeys:
    """`prefix`: all keys that begin with `key`. `prev_kv`: tell what they were."""

    key: str
    prefix: bool = False
    prev_kv: bool = False

    def document(self) -> dict[str, Any]:
        return _range(self.key, self.prefix) | ({"prev_kv": True} if self.prev_kv else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadKeys:
    """A range read: the key `key`, with `prefix` all that begin with it, with `end` all from `key` up to but without `end`.

    `serializable`: any member may answer from what it has, which may be old. `revision` 0 is the current one."""

    key: str
    end: str = ""
    prefix: bool = False
    limit: int = 0
    revision: int = 0
    serializable: bool = False
    keys_only: bool = False
    count_only: bool = False

    def document(self) -> dict[str, Any]:
        document = _range(self.key, self.prefix)
        if self.end:
            document["range_end"] = raw(self.end)
        for name in ("limit", "revision", "serializable", "keys_only", "count_only"):
            if value := getattr(self, name):
                document[name] = value
        return document


Operation = PutKey | DeleteKeys | ReadKeys


@dataclass(frozen=True, slots=True)
class Compare:
    """`key`'s `target` against `value`. A key that is not there has version, create and mod revision 0.

    prefix: it must hold for every key that begins with `key`; where there is none, as for one that is not there."""

    key: str
    target: Literal["VERSION", "CREATE", "MOD", "LEASE", "VALUE"]
    value: int | bytes
    result: Literal["EQUAL", "NOT_EQUAL", "GREATER", "LESS"] = "EQUAL"
    prefix: bool = False

    def document(self) -> dict[str, Any]:
        name = {"CREATE": "create_revision", "MOD": "mod_revision"}.get(self.target, self.target.lower())
        return _range(self.key, self.prefix) | {"target": self.target, "result": self.result, name: self.value}


def operation_document(operation: Operation) -> dict[str, Any]:
    match operation:
        case PutKey():
            return {"request_put": operation.document()}
        case DeleteKeys():
            return {"request_delete_range": operation.document()}
        case ReadKeys():
            return {"request_range": operation.document()}


def raw(key: str) -> bytes:
    return key.encode(errors="surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with `prefix` (etcd's rule: the last byte that can be raised is; the
    empty prefix, and one of 0xff alone, go up to the last key)."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def _range(key: str, prefix: bool) -> dict[str, Any]:
    if not prefix:
        return {"key": raw(key)}
    return {"key": raw(key) or b"\0", "range_end": prefix_end(raw(key))}


def error_from(document: Mapping[str, Any] | None, http_status: int, where: str) -> EtcdError:
    """The error that an answer's body stands for. Its shape differs between etcd's versions and between calls and streams."""
    inner = document.get("error") if document else None
    fields: Mapping[str, Any] = inner if isinstance(inner, dict) else document or {}
    reason = str(fields.get("message") or inner or f"HTTP status {http_status}")
    code = fields.get("grpc_code", fields.get("code"))
    if not isinstance(code, int):
        code = 14 if http_status >= 500 else 2
    message = f"etcd at {where}: {reason.removeprefix('etcdserver: ')}"
    if "has been compacted" in reason:
        return EtcdCompacted(reason)
    if "future revision" in reason:
        return EtcdFutureRevision(code, reason, message)
    if "lease not found" in reason:
        return EtcdLeaseNotFound(code, reason, message)
    if code in (4, 14):
        # Without a leader nothing is proposed, so nothing can have happened.
        return EtcdUnavailable(reason, message, sent="no leader" not in reason and "not capable" not in reason)
    if code in (7, 16) or "auth" in reason or "user name is empty" in reason:
        return EtcdDenied(code, reason, message)
    return EtcdError(code, reason, message)
