"""Whatever well-typed document comes in: it is prepared, judged and printed, and nothing breaks."""

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from apidocuments import messages
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from podwire.apiserver import tables
from podwire.apiserver.apply import Manager, apply, record_update
from podwire.apiserver.fieldsets import duplicates
from podwire.apiserver.kinds import REGISTRY, Kind
from podwire.apiserver.schema import api_schema

NOW = datetime(2024, 1, 1, tzinfo=UTC)
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
every_kind = pytest.mark.parametrize("kind", list(REGISTRY), ids=lambda k: k.resource.api_version + "." + k.resource.kind)


def document(kind: Kind, data: st.DataObject) -> dict[str, Any]:
    obj = data.draw(messages(kind.message))
    obj["metadata"] = {"name": "web", "namespace": "shop", "uid": "1", "creationTimestamp": "2024-01-01T00:00:00Z"}
    return kind.fit(obj).document


@every_kind
@QUICK
@given(data=st.data())
def test_any_document_is_prepared_judged_and_printed(kind: Kind, data: st.DataObject) -> None:
    made = kind.prepare_create(document(kind, data), NOW)
    kind.validate(made)
    kind.warnings(made)
    assert all(isinstance(value, str) for value in kind.selectable_fields(made).values())
    assert len(tables.row(kind, made, NOW)["cells"]) == len(kind.columns)
    assert kind.to_storage(kind.from_storage(kind.to_storage(made))) == kind.to_storage(made)
    assert kind.fit(made) == (made, [])


@every_kind
@QUICK
@given(data=st.data())
def test_any_document_follows_any_other(kind: Kind, data: st.DataObject) -> None:
    old = kind.prepare_create(document(kind, data), NOW)
    for subresource in ("", "status"):
        new, before = document(kind, data), copy.deepcopy(old)
        merged = kind.prepare_update(new, old, subresource=subresource)
        kind.validate(merged, old, subresource=subresource)
        tables.row(kind, merged, NOW)
        assert old == before


@every_kind
@QUICK
@given(data=st.data())
def test_any_document_is_applied_over_any_other(kind: Kind, data: st.DataObject) -> None:
    head = {"apiVersion": kind.resource.api_version, "kind": kind.resource.kind}
    first, second = ({**head, **document(kind, data)} for _ in range(2))
    alice, bob = (Manager(name, kind.resource.api_version) for name in ("alice", "bob"))
    assume(not any(duplicates(obj, kind.message, api_schema()) for obj in (first, second)))
    once = apply(None, first, kind.message, alice, "t1")
    assert apply(once, first, kind.message, alice, "t2") == once
    both = apply(once, second, kind.message, bob, "t2", force=True)
    assert apply(both, second, kind.message, bob, "t3") == both
    record_update({**first, "metadata": both["metadata"]}, both, kind.message, bob, "t4")
