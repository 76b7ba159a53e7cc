"""The CNI codec: verbs × versions × cases, the specification's own examples, and what nobody should send."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.cni import (
    CNI_VERSIONS,
    INCOMPATIBLE_VERSION,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    UNDECODABLE,
    AttachmentKey,
    Bandwidth,
    CniError,
    PortMapping,
)
from podwire.wire.cni import (
    VARIABLES,
    decode_answer,
    decode_frame,
    decode_result,
    encode_answer,
    encode_frame,
    parse_request,
    render_error,
    render_result,
    render_versions,
)

ENVIRONMENT = {"CNI_CONTAINERID": "abc", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0"}
VERBS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
NO_CHECK = ("0.3.0", "0.3.1")


def env(verb: str, **more: str) -> dict[str, str]:
    return {"CNI_COMMAND": verb, **ENVIRONMENT, **more}


def conf(version: Any = "1.1.0", **more: Any) -> bytes:
    return json.dumps({"cniVersion": version, "name": "net", "type": "podwire", **more}).encode()


def mapping(**port: Any) -> bytes:
    return conf(runtimeConfig={"portMappings": [port]})


# --- verbs and versions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("version", CNI_VERSIONS)
def test_which_version_allows_which_verb(verb: str, version: str) -> None:
    allowed = not (verb == "CHECK" and version in NO_CHECK) and (verb not in ("GC", "STATUS") or version == "1.1.0")
    if allowed:
        assert parse_request(env(verb), conf(version)).command == verb
    else:
        with pytest.raises(CniError, match=f"{version} does not allow {verb}") as caught:
            parse_request(env(verb), conf(version))
        assert caught.value.code == INCOMPATIBLE_VERSION


@pytest.mark.parametrize("verb", VERBS[:-1])
@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "2.0.0", "banana", 7])
def test_versions_that_are_not_known(verb: str, version: Any) -> None:
    with pytest.raises(CniError, match="incompatible") as caught:
        parse_request(env(verb), conf(version))
    assert caught.value.code == INCOMPATIBLE_VERSION


def test_a_config_without_version_is_0_1_0() -> None:
    with pytest.raises(CniError) as caught:
        parse_request(env("ADD"), b'{"name": "net", "type": "podwire"}')
    assert caught.value.code == INCOMPATIBLE_VERSION
    assert "0.1.0" in caught.value.details


def test_version_is_answered_whatever_the_config() -> None:
    for version in ("0.4.0", "9.9.9"):
        request = parse_request({"CNI_COMMAND": "VERSION"}, conf(version))
        assert render_versions(request.version)["supportedVersions"] == list(CNI_VERSIONS)


# --- what must be there -------------------------------------------------------------------------------------------

CASES: tuple[tuple[str, dict[str, str], bytes, int, str], ...] = (
    ("ADD", {"CNI_CONTAINERID": ""}, conf(), INVALID_ENVIRONMENT, "CNI_CONTAINERID"),
    ("ADD", {"CNI_NETNS": ""}, conf(), INVALID_ENVIRONMENT, "CNI_NETNS"),
    ("ADD", {"CNI_IFNAME": ""}, conf(), INVALID_ENVIRONMENT, "CNI_IFNAME"),
    ("DEL", {"CNI_IFNAME": ""}, conf(), INVALID_ENVIRONMENT, "CNI_IFNAME"),
    ("CHECK", {"CNI_NETNS": ""}, conf(), INVALID_ENVIRONMENT, "CNI_NETNS"),
    ("", {}, conf(), INVALID_ENVIRONMENT, "CNI_COMMAND"),
    ("REMOVE", {}, conf(), INVALID_ENVIRONMENT, "REMOVE"),
    ("ADD", {"CNI_CONTAINERID": "../etc"}, conf(), INVALID_ENVIRONMENT, "CNI_CONTAINERID"),
    ("ADD", {"CNI_IFNAME": "a" * 16}, conf(), INVALID_ENVIRONMENT, "CNI_IFNAME"),
    ("ADD", {"CNI_IFNAME": "eth0:1"}, conf(), INVALID_ENVIRONMENT, "CNI_IFNAME"),
    ("ADD", {"CNI_IFNAME": ".."}, conf(), INVALID_ENVIRONMENT, "CNI_IFNAME"),
    ("ADD", {"CNI_ARGS": "nonsense"}, conf(), INVALID_ENVIRONMENT, "CNI_ARGS"),
    ("ADD", {}, b"", UNDECODABLE, "JSON object"),
    ("ADD", {}, b"{", UNDECODABLE, "JSON"),
    ("ADD", {}, b"[]", UNDECODABLE, "JSON object"),
    ("ADD", {}, conf(prevResult=7), UNDECODABLE, "prevResult"),
    ("ADD", {}, conf(prevResult={"ips": [{"address": "x"}]}), UNDECODABLE, "prevResult"),
    ("ADD", {}, conf(name=""), INVALID_CONFIG, "missing network name"),
    ("ADD", {}, conf(name="a b"), INVALID_CONFIG, "network name"),
    ("ADD", {}, conf(mtu=-1), INVALID_CONFIG, "mtu"),
    ("ADD", {}, conf(runtimeConfig={"ips": ["10.0.0.300"]}), INVALID_CONFIG, "10.0.0.300"),
    ("ADD", {}, conf(runtimeConfig={"mac": "zz"}), INVALID_CONFIG, "zz"),
    ("ADD", {}, conf(runtimeConfig={"mac": "01:00:5e:00:00:01"}), INVALID_CONFIG, "multicast"),
    ("ADD", {}, mapping(hostPort=0, containerPort=1), INVALID_CONFIG, "hostPort"),
    ("ADD", {}, mapping(hostPort=1, containerPort=70000), INVALID_CONFIG, "containerPort"),
    ("ADD", {}, mapping(hostPort=1, containerPort=True), INVALID_CONFIG, "containerPort"),
    ("ADD", {}, mapping(hostPort=1, containerPort=1, protocol="icmp"), INVALID_CONFIG, "icmp"),
    ("ADD", {}, conf(runtimeConfig={"portMappings": [7]}), INVALID_CONFIG, "portMappings"),
    ("ADD", {}, conf(runtimeConfig={"bandwidth": {"ingressRate": 5}}), INVALID_CONFIG, "burst"),
    ("ADD", {}, conf(runtimeConfig={"bandwidth": {"egressRate": 5, "egressBurst": 1 << 33}}), INVALID_CONFIG, "egressBurst"),
    ("ADD", {}, conf(ipam={"routes": [{"dst": "nowhere"}]}), INVALID_CONFIG, "nowhere"),
    ("GC", {}, conf(**{"cni.dev/valid-attachments": [{"containerID": "x"}]}), INVALID_CONFIG, "ifname"),
)


@pytest.mark.parametrize(("verb", "changes", "config", "code", "words"), CASES)
def test_refusals(verb: str, changes: dict[str, str], config: bytes, code: int, words: str) -> None:
    with pytest.raises(CniError) as caught:
        parse_request(env(verb, **changes), config)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert render_error(caught.value, "1.0.0") | {"details": ""} == {
        "cniVersion": "1.0.0",
        "code": code,
        "msg": caught.value.message,
        "details": "",
    }


def test_del_needs_no_namespace() -> None:
    assert parse_request(env("DEL", CNI_NETNS=""), conf()).netns == ""


# --- what can be asked for ----------------------------------------------------------------------------------------


def test_runtime_config() -> None:
    runtime = {
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "TCP"},
            {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
        ],
        "bandwidth": {"ingressRate": 1000, "ingressBurst": 2000, "egressRate": 3000, "egressBurst": 4000},
        "ips": ["10.244.1.9/24", "fd00::9"],
        "mac": "0A:00:00:00:00:01",
        "io.kubernetes.cri.pod-annotations": {"app": "web"},
    }
    request = parse_request(env("ADD", CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAME=web-0"), conf(runtimeConfig=runtime))
    assert request.ports == (PortMapping(8080, 80, "TCP"), PortMapping(53, 53, "UDP", "127.0.0.1"))
    assert request.bandwidth == Bandwidth(1000, 2000, 3000, 4000)
    assert [str(ip) for ip in request.ips] == ["10.244.1.9", "fd00::9"]
    assert request.mac == "0a:00:00:00:00:01"
    assert request.args["K8S_POD_NAME"] == "web-0"
    assert request.annotations == {"app": "web"}


def test_names_in_the_spelling_of_containerd() -> None:
    runtime = {
        "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}],
        "bandwidth": {"IngressRate": 1000, "IngressBurst": 4294967295, "EgressRate": 0, "EgressBurst": 0},
    }
    request = parse_request(env("ADD"), conf(runtimeConfig=runtime))
    assert request.ports == (PortMapping(8080, 80, "TCP"),)
    assert request.bandwidth == Bandwidth(1000, 4294967295)


def test_conventions_below_capabilities() -> None:
    config = conf(args={"cni": {"ips": ["10.0.0.7"], "mac": "02:00:00:00:00:07"}})
    request = parse_request(env("ADD", CNI_ARGS="IP=10.0.0.8;MAC=02:00:00:00:00:08"), config)
    assert ([str(ip) for ip in request.ips], request.mac) == (["10.0.0.7"], "02:00:00:00:00:07")
    request = parse_request(env("ADD", CNI_ARGS="IP=10.0.0.8;MAC=02:00:00:00:00:08"), conf())
    assert ([str(ip) for ip in request.ips], request.mac) == (["10.0.0.8"], "02:00:00:00:00:08")


def test_gc_names_what_is_valid() -> None:
    attachments = [{"containerID": "abc", "ifname": "eth0"}, {"containerID": "def", "ifname": "net1"}]
    request = parse_request({"CNI_COMMAND": "GC"}, conf(**{"cni.dev/valid-attachments": attachments}))
    assert request.valid == {AttachmentKey("abc", "eth0"), AttachmentKey("def", "net1")}


# --- results ------------------------------------------------------------------------------------------------------

SPEC_RESULT = {
    "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2}],
    "routes": [{"dst": "0.0.0.0/0"}],
    "interfaces": [
        {"name": "cni0", "mac": "00:11:22:33:44:55"},
        {"name": "veth3243", "mac": "55:44:33:22:11:11"},
        {"name": "eth0", "mac": "99:88:77:66:55:44", "sandbox": "/var/run/netns/blue"},
    ],
    "dns": {"nameservers": ["10.1.0.1"]},
}
"""From the specification's section "Add example"."""


@pytest.mark.parametrize("version", CNI_VERSIONS)
def test_the_specifications_result_in_every_version(version: str) -> None:
    document = {"cniVersion": version, **SPEC_RESULT}
    rendered = render_result(decode_result(document), version)
    if version < "1.0.0":
        assert rendered["ips"][0].pop("version") == "4"
    assert rendered == document


def test_the_specifications_configuration_is_understood() -> None:
    config = {
        "cniVersion": "1.1.0",
        "name": "dbnet",
        "type": "bridge",
        "bridge": "cni0",
        "keyA": ["some more", "plugin specific", "configuration"],
        "ipam": {"type": "host-local", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
        "dns": {"nameservers": ["10.1.0.1"]},
        "runtimeConfig": {"mac": "00:11:22:33:44:66"},
        "prevResult": SPEC_RESULT,
    }
    request = parse_request(env("ADD"), json.dumps(config).encode())
    assert request.previous is not None
    assert str(request.previous.ips[0].address) == "10.1.0.5/16"
    assert request.previous_document == SPEC_RESULT
    assert (request.mac, request.dns) == ("00:11:22:33:44:66", {"nameservers": ["10.1.0.1"]})


# --- frames -------------------------------------------------------------------------------------------------------

_VALUES = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40)


@given(st.dictionaries(st.sampled_from(VARIABLES), _VALUES), st.binary(max_size=200))
def test_a_frame_comes_through(environment: dict[str, str], config: bytes) -> None:
    known = {name: value for name, value in environment.items() if value}
    assert decode_frame(encode_frame(environment, config)) == (known, config)


@given(st.integers(0, 255), st.binary(max_size=200), st.integers(1, 50))
def test_an_answer_comes_through_or_is_known_to_be_cut(status: int, document: bytes, cut: int) -> None:
    answer = encode_answer(status, document)
    assert decode_answer(answer) == (status, document)
    if document:
        with pytest.raises(ValueError, match="cut short"):
            decode_answer(answer[: -min(cut, len(document))])


@given(st.binary(max_size=300))
def test_nothing_but_cni_errors_comes_of_rubbish(config: bytes) -> None:
    with pytest.raises(CniError):
        parse_request(env("ADD"), config)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = ("runtimeConfig", "args", "ipam", "dns", "prevResult", "mtu", "type", "ingressRate", "ingressBurst")
_RUNTIME = ("portMappings", "bandwidth", "ips", "mac", "io.kubernetes.cri.pod-annotations")


_VALUE = _JSON | st.dictionaries(st.sampled_from(_RUNTIME), _JSON, max_size=2)


@given(st.dictionaries(st.sampled_from(_FIELDS), _VALUE, max_size=3), st.sampled_from(VERBS))
def test_documents_of_any_shape_are_understood_or_refused(fields: dict[str, Any], verb: str) -> None:
    try:
        parse_request(env(verb), conf(**fields))
    except CniError as error:
        assert error.code in (INVALID_CONFIG, UNDECODABLE)  # noqa: PT017  # any other error fails the test
