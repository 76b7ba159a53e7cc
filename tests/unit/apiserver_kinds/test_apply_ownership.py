"""Server-side apply: merge, ownership, conflicts, removal."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.apiserver.apply import LAST_APPLIED, ApplyConflict, Manager, apply, record_update
from podwire.apiserver.fieldsets import from_tree, paths_of, readable, to_tree
from podwire.apiserver.schema import api_schema
from podwire.apiserver.strategic import PatchFailed

DEPLOYMENT = "k8s.io.api.apps.v1.Deployment"
CONFIGMAP = "k8s.io.api.core.v1.ConfigMap"
ALICE, BOB = Manager("alice", "apps/v1"), Manager("bob", "apps/v1")
NOW = "2024-01-01T00:00:00Z"


def config(labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": "web", **({"labels": labels} if labels else {})}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, **({"spec": spec} if spec else {})}


def template(*containers: dict[str, Any]) -> dict[str, Any]:
    return {"spec": {"containers": list(containers)}}


def applied(live: Any, what: dict[str, Any], who: Manager = ALICE, *, force: bool = False) -> dict[str, Any]:
    before = copy.deepcopy(live)
    result = apply(live, what, DEPLOYMENT, who, NOW, force=force)
    assert live == before
    return result


def owners(obj: dict[str, Any]) -> dict[str, set[str]]:
    fields: dict[str, set[str]] = {}
    for entry in obj["metadata"].get("managedFields", []):
        fields.setdefault(entry["manager"], set()).update(readable(p) for p in from_tree(entry["fieldsV1"]))
    return fields


def test_the_first_apply_creates_and_owns() -> None:
    made = applied(None, config({"a": "1"}, replicas=2, template=template({"name": "c", "image": "x"})))
    assert made["spec"]["replicas"] == 2
    (entry,) = made["metadata"]["managedFields"]
    assert entry["fieldsV1"] == {
        "f:metadata": {"f:labels": {"f:a": {}}},
        "f:spec": {
            "f:replicas": {},
            "f:template": {"f:spec": {"f:containers": {'k:{"name":"c"}': {".": {}, "f:image": {}, "f:name": {}}}}},
        },
    }
    assert {k: entry[k] for k in ("manager", "operation", "apiVersion", "fieldsType")} == {
        "manager": "alice",
        "operation": "Apply",
        "apiVersion": "apps/v1",
        "fieldsType": "FieldsV1",
    }


def test_applying_the_same_again_changes_nothing() -> None:
    what = config({"a": "1"}, replicas=2, template=template({"name": "c", "image": "x"}))
    once = applied(None, what)
    assert applied(once, what) == once


def test_what_is_no_longer_applied_goes() -> None:
    ports = [{"containerPort": 80}, {"containerPort": 81}]
    once = applied(
        None, config({"a": "1", "b": "2"}, replicas=2, template=template({"name": "c", "image": "x", "ports": ports}))
    )
    less = applied(once, config({"a": "1"}, template=template({"name": "c", "image": "x", "ports": ports[:1]})))
    assert less["metadata"]["labels"] == {"a": "1"}
    assert less["spec"] == {"template": template({"name": "c", "image": "x", "ports": ports[:1]})}


def test_a_whole_list_item_goes_and_defaults_in_it_with_it() -> None:
    once = applied(None, config(template=template({"name": "c", "image": "x"}, {"name": "d", "image": "y"})))
    once["spec"]["template"]["spec"]["containers"][1]["imagePullPolicy"] = "Always"
    less = applied(once, config(template=template({"name": "c", "image": "x"})))
    assert [c["name"] for c in less["spec"]["template"]["spec"]["containers"]] == ["c"]


def test_what_others_own_stays() -> None:
    once = applied(None, config({"a": "1"}, replicas=2))
    both = applied(once, config({"a": "1", "b": "2"}), BOB)
    left = applied(both, config(replicas=2))
    assert left["metadata"]["labels"] == {"a": "1", "b": "2"}
    assert owners(left) == {"bob": {".metadata.labels.a", ".metadata.labels.b"}, "alice": {".spec.replicas"}}


def test_another_value_conflicts_and_the_same_value_is_shared() -> None:
    once = applied(None, config({"a": "1"}, replicas=2))
    shared = applied(once, config(replicas=2), BOB)
    assert owners(shared) == {"alice": {".metadata.labels.a", ".spec.replicas"}, "bob": {".spec.replicas"}}
    with pytest.raises(ApplyConflict) as caught:
        applied(once, config(replicas=3), BOB)
    assert str(caught.value) == 'Apply failed with 1 conflict: conflict with "alice": .spec.replicas'
    assert caught.value.causes == [("FieldManagerConflict", 'conflict with "alice"', ".spec.replicas")]


def test_several_conflicts_are_listed() -> None:
    once = applied(None, config({"a": "1"}, replicas=2))
    with pytest.raises(ApplyConflict) as caught:
        applied(once, config({"a": "9"}, replicas=3), BOB)
    assert str(caught.value) == (
        'Apply failed with 2 conflicts: conflicts with "alice":\n- .metadata.labels.a\n- .spec.replicas'
    )


def test_force_takes_the_field_over() -> None:
    forced = applied(applied(None, config({"a": "1"}, replicas=2)), config(replicas=3), BOB, force=True)
    assert forced["spec"]["replicas"] == 3
    assert owners(forced) == {"alice": {".metadata.labels.a"}, "bob": {".spec.replicas"}}


def test_another_writers_change_takes_the_field_and_conflicts_with_the_next_apply() -> None:
    once = applied(None, config({"a": "1"}, replicas=2))
    scaled = {**once, "spec": {"replicas": 5}}
    recorded = record_update(scaled, once, DEPLOYMENT, Manager("kubectl", "apps/v1", "Update", "scale"), NOW)
    assert owners(recorded) == {"alice": {".metadata.labels.a"}, "kubectl": {".spec.replicas"}}
    with pytest.raises(ApplyConflict, match=r'conflict with "kubectl" with subresource "scale" using apps/v1: .spec.replicas'):
        applied(recorded, config({"a": "1"}, replicas=2))
    assert applied(recorded, config({"a": "1"}))["spec"]["replicas"] == 5


def test_objects_never_applied_are_not_tracked() -> None:
    old = config(replicas=1)
    assert "managedFields" not in record_update(config(replicas=2), old, DEPLOYMENT, BOB, NOW)["metadata"]


def test_the_first_apply_of_an_untracked_object_conflicts_with_what_was_before() -> None:
    with pytest.raises(ApplyConflict, match=r'conflict with "before-first-apply" using apps/v1: .spec.replicas'):
        applied(config(replicas=1), config(replicas=2))
    assert applied(config(replicas=1), config(replicas=1))["spec"] == {"replicas": 1}


def test_kubectl_moves_from_client_side_to_server_side_apply() -> None:
    live = config(replicas=1)
    live["metadata"]["annotations"] = {LAST_APPLIED: '{"spec": {"replicas": 1}}'}
    kubectl = Manager("kubectl", "apps/v1")
    assert applied(live, config(replicas=2), kubectl)["spec"]["replicas"] == 2
    with pytest.raises(ApplyConflict):
        applied(live, config(replicas=2), ALICE)


def test_atomic_lists_are_owned_whole() -> None:
    once = applied(None, config(template=template({"name": "c", "args": ["1", "2"]})))
    with pytest.raises(ApplyConflict, match=r'containers\[name="c"\].args'):
        applied(once, config(template=template({"name": "c", "args": ["1", "3"]})), BOB)


def test_two_items_of_one_key_cannot_be_applied() -> None:
    with pytest.raises(PatchFailed, match=r'containers: duplicate entries for key \[name="c"\]'):
        applied(None, config(template=template({"name": "c"}, {"name": "c"})))


KEYS = st.sampled_from("abcdef")
DATA = st.dictionaries(KEYS, st.sampled_from(["1", "2"]), max_size=5)


def data(values: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, **({"data": values} if values else {})}


@given(st.lists(st.tuples(st.sampled_from(["alice", "bob", "carol"]), DATA), max_size=6))
def test_forced_applies_leave_exactly_what_somebody_still_applies(steps: list[tuple[str, dict[str, str]]]) -> None:
    live: dict[str, Any] | None = None
    wanted: dict[str, dict[str, str]] = {}
    for who, values in steps:
        live = apply(live, data(values), CONFIGMAP, Manager(who, "v1"), NOW, force=True)
        wanted[who] = values
        for other in wanted:
            if other != who:
                wanted[other] = {k: v for k, v in wanted[other].items() if k not in values or values[k] == v}
    expected: dict[str, str] = {}
    for values in wanted.values():
        expected |= values
    assert (live or {}).get("data", {}) == expected


@given(DATA, DATA)
def test_trees_and_paths_are_two_forms_of_one_set(left: dict[str, str], right: dict[str, str]) -> None:
    paths = set(paths_of(data(left), CONFIGMAP, api_schema())) | set(paths_of(data(right), CONFIGMAP, api_schema()))
    assert from_tree(to_tree(paths)) == paths
