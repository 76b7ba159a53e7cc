import base64
import ipaddress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.model.objects import ConfigMap, Container, Pod, Secret
from podwire.model.podruntime import PodNetwork
from podwire.runtime.environment import References, command_line, environment, expand
from podwire.runtime.errors import RuntimeFailure

NETWORK = PodNetwork(
    ips=(ipaddress.ip_address("10.244.1.5"), ipaddress.ip_address("fd00:10:244:1::5")),
    host_ips=(ipaddress.ip_address("198.18.0.10"),),
)
POD = msgspec.convert(
    {
        "metadata": {
            "name": "web-1",
            "namespace": "shop",
            "uid": "u1",
            "labels": {"app": "web", "tier": 'fr"ont'},
            "annotations": {"a/b": "c"},
        },
        "spec": {"nodeName": "node-1", "serviceAccountName": "robot"},
    },
    Pod,
)
CONFIG = msgspec.convert({"data": {"COLOR": "red", "MODE": "fast"}}, ConfigMap)
SECRET = msgspec.convert({"data": {"PASSWORD": base64.b64encode(b"s3cret").decode()}}, Secret)
REFERENCES = References({"cm": CONFIG}, {"sec": SECRET})


def env_of(**container: Any) -> dict[str, str]:
    described = msgspec.convert({"name": "web", **container}, Container)
    return environment(POD, described, NETWORK, REFERENCES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)", "1"),
        ("x$(A)y$(B)z", "x1y2z"),
        ("$(NONE)", "$(NONE)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A ${A} $", "$A ${A} $"),
        ("$(A", "$(A"),
        ("", ""),
    ],
)
def test_expansion_is_kubernetes_own(text: str, expected: str) -> None:
    assert expand(text, {"A": "1", "B": "2"}) == expected


@settings(deadline=None)
@given(st.text(alphabet="ab$() "))
def test_text_without_references_or_pairs_of_dollars_stays(text: str) -> None:
    if "$$" not in text and "$(" not in text:
        assert expand(text, {"a": "1"}) == text


def test_later_variables_see_earlier_ones() -> None:
    env = env_of(env=[{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)2"}, {"name": "C", "value": "$(D)"}])
    assert (env["B"], env["C"]) == ("12", "$(D)")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metadata.name", "web-1"),
        ("metadata.namespace", "shop"),
        ("metadata.uid", "u1"),
        ("metadata.labels['app']", "web"),
        ("metadata.annotations['a/b']", "c"),
        ("metadata.labels", 'app="web"\ntier="fr\\"ont"'),
        ("spec.nodeName", "node-1"),
        ("spec.serviceAccountName", "robot"),
        ("status.podIP", "10.244.1.5"),
        ("status.podIPs", "10.244.1.5,fd00:10:244:1::5"),
        ("status.hostIP", "198.18.0.10"),
    ],
)
def test_downward_fields(path: str, expected: str) -> None:
    assert env_of(env=[{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}}])["X"] == expected


def test_config_maps_and_secrets() -> None:
    env = env_of(
        envFrom=[{"configMapRef": {"name": "cm"}}, {"prefix": "DB_", "secretRef": {"name": "sec"}}],
        env=[
            {"name": "COLOR", "value": "blue"},
            {"name": "P", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "PASSWORD"}}},
            {"name": "GONE", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "nope", "optional": True}}},
        ],
    )
    assert (env["COLOR"], env["MODE"], env["DB_PASSWORD"], env["P"]) == ("blue", "fast", "s3cret", "s3cret")
    assert "GONE" not in env


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({"envFrom": [{"configMapRef": {"name": "no"}}]}, 'configmap "no" not found'),
        ({"envFrom": [{"secretRef": {"name": "no"}}]}, 'secret "no" not found'),
        (
            {"env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "no"}}}]},
            "couldn't find key no in ConfigMap shop/cm",
        ),
        ({"env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "status.moon"}}}]}, "no field 'status.moon'"),
    ],
)
def test_a_missing_reference_is_a_config_error(container: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeFailure, match=message) as caught:
        env_of(**container)
    assert caught.value.reason == "CreateContainerConfigError"


def test_a_secret_is_not_expanded_as_text() -> None:
    secret = msgspec.convert({"data": {"K": base64.b64encode(b"$$(A)").decode()}}, Secret)
    described = msgspec.convert(
        {"name": "c", "env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "K"}}}]}, Container
    )
    assert environment(POD, described, NETWORK, References({}, {"s": secret}))["K"] == "$$(A)"


def test_the_command_line_is_expanded_and_absent_without_a_command() -> None:
    container = Container(name="c", command=("sh", "-c"), args=("echo $(A)",))
    assert command_line(container, {"A": "1"}) == ("sh", "-c", "echo 1")
    assert command_line(Container(name="c", args=("--flag",)), {}) == ()
