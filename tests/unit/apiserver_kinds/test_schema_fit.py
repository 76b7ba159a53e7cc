"""Documents are made to fit their kind: types checked, unknown fields found, nulls and empties left out."""

from typing import Any

import pytest

from podwire.apiserver.kinds import REGISTRY, Kind
from podwire.apiserver.schema import BadDocument, api_schema, strict_error

DEPLOYMENT = "Deployment"


def kind(name: str) -> Kind:
    return next(k for k in REGISTRY if k.resource.kind == name and k.resource.group != "events.k8s.io")


def test_unknown_fields_are_left_out_and_named_by_path() -> None:
    containers = [{"name": "a", "imag": "x"}]
    given = {"metadata": {"nam": "x"}, "spec": {"foo": {"deep": 1}, "template": {"spec": {"containers": containers}}}}
    fitted = kind(DEPLOYMENT).fit(given)
    assert fitted.unknown == ["metadata.nam", "spec.foo", "spec.template.spec.containers[0].imag"]
    assert fitted.document["spec"] == {"template": {"spec": {"containers": [{"name": "a"}]}}}
    assert strict_error(fitted.unknown[:2]) == 'strict decoding error: unknown field "metadata.nam", unknown field "spec.foo"'


def test_nulls_and_empty_lists_and_maps_go_and_empty_messages_stay() -> None:
    spec: dict[str, Any] = {"volumes": [{"name": "v", "emptyDir": {}}], "nodeSelector": {}, "tolerations": [], "hostname": None}
    fitted = kind("Pod").fit({"metadata": {"creationTimestamp": None, "labels": {}}, "spec": spec})
    head = {"apiVersion": "v1", "kind": "Pod"}
    assert fitted.document == {**head, "metadata": {}, "spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}


def test_inline_messages_stand_among_their_parents_fields() -> None:
    spec = {"containers": [{"name": "a", "readinessProbe": {"httpGet": {"port": "http"}, "periodSeconds": 1}}]}
    assert kind("Pod").fit({"spec": spec}).unknown == []


@pytest.mark.parametrize(
    ("name", "document", "says"),
    [
        (
            DEPLOYMENT,
            {"spec": {"replicas": "3"}},
            "cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            DEPLOYMENT,
            {"spec": {"replicas": 1.5}},
            "cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (DEPLOYMENT, {"spec": {"replicas": 2**31}}, "cannot unmarshal number 2147483648 into Go struct field"),
        (
            DEPLOYMENT,
            {"spec": {"paused": "yes"}},
            "cannot unmarshal string into Go struct field DeploymentSpec.spec.paused of type bool",
        ),
        (
            "Pod",
            {"spec": {"containers": {}}},
            r"cannot unmarshal object into Go struct field PodSpec.spec.containers of type \[\]v1.Container",
        ),
        ("Pod", {"spec": []}, "cannot unmarshal array into Go struct field Pod.spec of type v1.PodSpec"),
        (
            "Pod",
            {"spec": {"containers": [{"args": [1]}]}},
            "cannot unmarshal number into Go struct field Container.spec.containers.args of type string",
        ),
        (
            "Service",
            {"spec": {"selector": {"a": 1}}},
            "cannot unmarshal number into Go struct field ServiceSpec.spec.selector of type string",
        ),
        ("Service", {"spec": {"selector": "a"}}, r"of type map\[string\]string"),
        (
            "Pod",
            {"spec": {"containers": [{"resources": {"limits": {"cpu": "lots"}}}]}},
            "quantities must match the regular expression",
        ),
        ("Secret", {"data": {"a": "!"}}, "illegal base64 data at input byte 0"),
        ("Lease", {"spec": {"renewTime": "now"}}, 'parsing time "now"'),
    ],
)
def test_wrong_types_are_told_in_gos_words(name: str, document: dict[str, Any], says: str) -> None:
    with pytest.raises(BadDocument, match=says):
        kind(name).fit(document)


def test_the_message_names_kind_and_version() -> None:
    with pytest.raises(BadDocument, match=r'^Deployment in version "v1" cannot be handled as a Deployment: json: '):
        kind(DEPLOYMENT).fit({"spec": 1})
    with pytest.raises(BadDocument, match="cannot unmarshal array into Go value of type"):
        kind(DEPLOYMENT).fit([])


def test_numbers_where_quantities_are_wanted_become_text() -> None:
    resources = {"limits": {"cpu": 2, "memory": "64Mi"}}
    fitted = kind("Pod").fit({"spec": {"containers": [{"name": "a", "resources": resources}]}})
    assert fitted.document["spec"]["containers"][0]["resources"] == {"limits": {"cpu": "2", "memory": "64Mi"}}


def test_every_kinds_message_is_in_the_table() -> None:
    assert all(k.message in api_schema().numbered for k in REGISTRY)
