"""etcd's answers as errors, whatever their shape, and ranges by prefix."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.client.etcdmessages import (
    Compare,
    EtcdCompacted,
    EtcdDenied,
    EtcdError,
    EtcdFutureRevision,
    EtcdLeaseNotFound,
    EtcdUnavailable,
    error_from,
    prefix_end,
)


@given(st.binary(min_size=1), st.binary())
def test_a_prefix_range_holds_what_begins_with_it_and_nothing_else(prefix: bytes, key: bytes) -> None:
    end = prefix_end(prefix)
    inside = key >= prefix and (end == b"\0" or key < end)
    assert inside == key.startswith(prefix) or (end == b"\0" and key >= prefix)
    assert prefix + key >= prefix
    assert end == b"\0" or prefix + key < end


@pytest.mark.parametrize(
    ("document", "status", "kind"),
    [
        # etcd 3.4, as a whole answer and on a stream; etcd 3.5 and later.
        ({"error": "etcdserver: requested lease not found", "message": "…lease not found", "code": 5}, 404, EtcdLeaseNotFound),
        ({"error": {"grpc_code": 14, "http_code": 503, "message": "etcdserver: no leader"}}, 200, EtcdUnavailable),
        ({"code": 14, "message": "etcdserver: request timed out", "details": []}, 503, EtcdUnavailable),
        ({"code": 11, "message": "etcdserver: mvcc: required revision has been compacted"}, 400, EtcdCompacted),
        ({"code": 11, "message": "etcdserver: mvcc: required revision is a future revision"}, 400, EtcdFutureRevision),
        ({"code": 16, "message": "etcdserver: invalid auth token"}, 401, EtcdDenied),
        ({"code": 7, "message": "etcdserver: permission denied"}, 403, EtcdDenied),
        ({"code": 3, "message": "etcdserver: user name is empty"}, 400, EtcdDenied),
        ({"code": 3, "message": "etcdserver: key is not provided"}, 400, EtcdError),
        (None, 502, EtcdUnavailable),
        (None, 404, EtcdError),
        ({"error": "Not Found"}, 404, EtcdError),
    ],
)
def test_errors(document: dict[str, Any] | None, status: int, kind: type[EtcdError]) -> None:
    assert type(error_from(document, status, "http://a:2379")) is kind


def test_without_a_leader_nothing_was_done() -> None:
    """So that a write may be sent to another member."""
    nobody = error_from({"code": 14, "message": "etcdserver: no leader"}, 503, "http://a:2379")
    timeout = error_from({"code": 14, "message": "etcdserver: request timed out"}, 503, "http://a:2379")
    assert isinstance(nobody, EtcdUnavailable)
    assert isinstance(timeout, EtcdUnavailable)
    assert (nobody.sent, timeout.sent) == (False, True)
    assert str(nobody) == "etcd at http://a:2379: no leader"


def test_a_comparison_names_its_field() -> None:
    assert Compare("k", "VERSION", 0).document() == {"key": b"k", "target": "VERSION", "result": "EQUAL", "version": 0}
    assert Compare("k", "MOD", 7).document()["mod_revision"] == 7
    assert Compare("k", "CREATE", 0, prefix=True).document()["range_end"] == b"l"
