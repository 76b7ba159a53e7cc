"""What creation and updates make of a document: defaults, first status, generation, what is kept and what may not change."""

import copy
from datetime import UTC, datetime
from typing import Any

import pytest

from podwire.apiserver.kinds import REGISTRY, Kind

NOW = datetime(2024, 1, 1, tzinfo=UTC)
META = {"name": "web", "namespace": "shop"}


def kind(name: str, group: str | None = None) -> Kind:
    return next(k for k in REGISTRY if k.resource.kind == name and (group is None or k.resource.group == group))


def created(name: str, **parts: Any) -> dict[str, Any]:
    return kind(name).prepare_create({"metadata": dict(META), **copy.deepcopy(parts)}, NOW)


def updated(name: str, old: dict[str, Any], change: Any, subresource: str = "") -> dict[str, Any]:
    new = copy.deepcopy(old)
    change(new)
    before = copy.deepcopy(old)
    result = kind(name).prepare_update(new, old, subresource=subresource)
    assert old == before
    return result


def refused(name: str, old: dict[str, Any], change: Any) -> list[str]:
    return [str(e) for e in kind(name).validate(updated(name, old, change), old)]


SPEC = {"containers": [{"name": "c", "image": "nginx"}]}
DEPLOYMENT = {
    "spec": {
        "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": SPEC},
    }
}
SERVICE = {"spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}


@pytest.mark.parametrize("one", list(REGISTRY), ids=lambda k: k.resource.api_version + "." + k.resource.kind)
def test_defaults_are_idempotent(one: Kind) -> None:
    parts: dict[str, Any] = {"Pod": {"spec": SPEC}, "Deployment": DEPLOYMENT, "ReplicaSet": DEPLOYMENT, "Service": SERVICE}
    obj = one.prepare_create({"metadata": dict(META), **copy.deepcopy(parts.get(one.resource.kind, {}))}, NOW)
    assert one.prepare_update(copy.deepcopy(obj), obj) == obj


def test_a_pod_gets_what_kubernetes_gives_it() -> None:
    pod = created("Pod", spec={"containers": [{"name": "c", "image": "nginx", "ports": [{"containerPort": 80}]}]})
    spec = pod["spec"]
    assert pod["status"] == {"phase": "Pending", "qosClass": "BestEffort"}
    assert spec["containers"][0] == {
        "name": "c",
        "image": "nginx",
        "imagePullPolicy": "Always",
        "ports": [{"containerPort": 80, "protocol": "TCP"}],
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
    }
    assert {
        key: spec[key] for key in ("restartPolicy", "dnsPolicy", "terminationGracePeriodSeconds", "serviceAccountName")
    } == {
        "restartPolicy": "Always",
        "dnsPolicy": "ClusterFirst",
        "terminationGracePeriodSeconds": 30,
        "serviceAccountName": "default",
    }
    assert [t["key"] for t in spec["tolerations"]] == ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"]


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("nginx", "Always"),
        ("nginx:latest", "Always"),
        ("nginx:1.25", "IfNotPresent"),
        ("registry:5000/nginx", "Always"),
        ("registry:5000/nginx:1", "IfNotPresent"),
        ("nginx@sha256:abc", "IfNotPresent"),
    ],
)
def test_the_pull_policy_follows_the_tag(image: str, policy: str) -> None:
    pod = created("Pod", spec={"containers": [{"name": "c", "image": image}]})
    assert pod["spec"]["containers"][0]["imagePullPolicy"] == policy


def test_probes_hooks_volumes_and_env_get_their_defaults() -> None:
    container = {
        "name": "c",
        "image": "x:1",
        "readinessProbe": {"httpGet": {"port": 80}},
        "lifecycle": {"preStop": {"httpGet": {"port": 80}}},
        "env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
    }
    volumes = [{"name": "a"}, {"name": "b", "configMap": {"name": "x"}}, {"name": "c", "hostPath": {"path": "/x"}}]
    pod = created("Pod", spec={"containers": [container], "volumes": volumes})
    made = pod["spec"]["containers"][0]
    assert made["readinessProbe"] == {
        "httpGet": {"port": 80, "path": "/", "scheme": "HTTP"},
        "timeoutSeconds": 1,
        "periodSeconds": 10,
        "successThreshold": 1,
        "failureThreshold": 3,
    }
    assert made["lifecycle"]["preStop"]["httpGet"]["scheme"] == "HTTP"
    assert made["env"][0]["valueFrom"]["fieldRef"]["apiVersion"] == "v1"
    assert made["resources"]["requests"] == {"cpu": "1", "memory": "1Gi"}
    assert pod["status"]["qosClass"] == "Guaranteed"
    assert pod["spec"]["volumes"] == [
        {"name": "a", "emptyDir": {}},
        {"name": "b", "configMap": {"name": "x", "defaultMode": 420}},
        {"name": "c", "hostPath": {"path": "/x", "type": ""}},
    ]


def test_host_network_opens_the_ports_on_the_host() -> None:
    spec = {"hostNetwork": True, "containers": [{"name": "c", "image": "x", "ports": [{"containerPort": 80}]}]}
    assert created("Pod", spec=spec)["spec"]["containers"][0]["ports"][0]["hostPort"] == 80


def test_a_deployment_counts_generations_of_its_spec_only() -> None:
    old = created("Deployment", **DEPLOYMENT)
    assert old["metadata"]["generation"] == 1
    assert old["spec"]["replicas"] == 1
    assert old["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}}
    relabelled = updated("Deployment", old, lambda d: d["metadata"].update(labels={"a": "b"}))
    assert relabelled["metadata"]["generation"] == 1
    scaled = updated("Deployment", old, lambda d: d["spec"].update(replicas=3))
    assert scaled["metadata"]["generation"] == 2


def test_spec_and_status_are_written_apart() -> None:
    old = created("Deployment", **DEPLOYMENT)

    def both(obj: dict[str, Any]) -> None:
        obj["spec"]["replicas"] = 9
        obj["status"] = {"replicas": 9}

    main, sub = updated("Deployment", old, both), updated("Deployment", old, both, "status")
    assert (main["spec"]["replicas"], main.get("status")) == (9, None)
    assert (sub["spec"]["replicas"], sub["status"], sub["metadata"]["generation"]) == (1, {"replicas": 9}, 1)


def test_a_status_write_may_annotate_a_node() -> None:
    node = kind("Node").prepare_create({"metadata": {"name": "n"}}, NOW)
    annotated = updated(
        "Node", node, lambda n: n["metadata"].update(annotations={"flannel.alpha.coreos.com/public-ip": "1"}), "status"
    )
    assert annotated["metadata"]["annotations"] == {"flannel.alpha.coreos.com/public-ip": "1"}


def test_new_objects_come_without_the_status_a_client_sends() -> None:
    assert created("Pod", spec=SPEC, status={"phase": "Running"})["status"]["phase"] == "Pending"


def test_a_namespace_gets_its_label_phase_and_finalizer() -> None:
    made = kind("Namespace").prepare_create({"metadata": {"name": "shop"}}, NOW)
    assert made["metadata"]["labels"] == {"kubernetes.io/metadata.name": "shop"}
    assert made["spec"] == {"finalizers": ["kubernetes"]}
    assert made["status"] == {"phase": "Active"}


def test_a_secrets_plain_text_is_encoded_over_its_data() -> None:
    made = created("Secret", data={"a": "MQ==", "b": "Mg=="}, stringData={"b": "three"})
    assert made["data"] == {"a": "MQ==", "b": "dGhyZWU="}
    assert "stringData" not in made
    assert made["type"] == "Opaque"


def test_an_update_that_leaves_out_what_was_allocated_keeps_it() -> None:
    old = created("Service", spec={"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{"port": 80}]})
    old["spec"] |= {"clusterIP": "10.96.1.1", "clusterIPs": ["10.96.1.1"], "healthCheckNodePort": 30100}
    old["spec"] |= {"ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}
    old["spec"]["ports"][0]["nodePort"] = 30099

    def bare(service: dict[str, Any]) -> None:
        service["spec"] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{"port": 80}]}

    assert updated("Service", old, bare) == old


def test_a_change_of_type_drops_what_only_the_old_type_had() -> None:
    old = created("Service", spec={"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{"port": 80}]})
    old["spec"]["ports"][0]["nodePort"] = 30099
    old["spec"]["healthCheckNodePort"] = 30100
    old["status"] = {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}
    new = updated("Service", old, lambda s: s["spec"].update(type="ClusterIP"))
    assert "nodePort" not in new["spec"]["ports"][0]
    assert not {"healthCheckNodePort", "externalTrafficPolicy", "allocateLoadBalancerNodePorts"} & set(new["spec"])
    assert new["status"] == {"loadBalancer": {}}
    assert kind("Service").validate(new, old) == []


@pytest.mark.parametrize("image", ["nginx:1.26"])
def test_a_pods_image_may_change_and_its_command_may_not(image: str) -> None:
    old = created("Pod", spec=SPEC)
    assert refused("Pod", old, lambda p: p["spec"]["containers"][0].update(image=image)) == []
    (said,) = refused("Pod", old, lambda p: p["spec"]["containers"][0].update(command=["x"]))
    assert said.startswith("spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`")
    (added,) = refused("Pod", old, lambda p: p["spec"]["containers"].append({"name": "d", "image": "x"}))
    assert added == "spec.containers: Forbidden: pod updates may not add or remove containers"


@pytest.mark.parametrize(
    ("name", "parts", "change", "says"),
    [
        (
            "Deployment",
            DEPLOYMENT,
            lambda o: o["spec"]["selector"]["matchLabels"].update(x="y"),
            'spec.selector: Invalid value: {"matchLabels":{"app":"web","x":"y"}}: field is immutable',
        ),
        ("Secret", {}, lambda o: o.update(type="x/y"), 'type: Invalid value: "x/y": field is immutable'),
        (
            "ConfigMap",
            {"immutable": True, "data": {"a": "1"}},
            lambda o: o["data"].update(a="2"),
            "data: Forbidden: field is immutable when `immutable` is set",
        ),
        (
            "EndpointSlice",
            {"addressType": "IPv4"},
            lambda o: o.update(addressType="IPv6"),
            'addressType: Invalid value: "IPv6": field is immutable',
        ),
        (
            "Service",
            {"spec": {"clusterIP": "10.96.0.5", "ports": [{"port": 80}]}},
            lambda o: o["spec"].update(clusterIP="10.96.0.6"),
            'spec.clusterIPs[0]: Invalid value: ["10.96.0.6"]: may not change once set',
        ),
        (
            "Node",
            {"spec": {"podCIDRs": ["10.244.0.0/24"]}},
            lambda o: o["spec"].update(podCIDRs=["10.244.1.0/24"]),
            'spec.podCIDRs: Forbidden: node updates may not change podCIDR except from "" to valid',
        ),
    ],
)
def test_what_may_not_change(name: str, parts: dict[str, Any], change: Any, says: str) -> None:
    assert says in refused(name, created(name, **parts), change)


@pytest.mark.parametrize(
    ("spec", "status", "requested", "seconds"),
    [
        ({"nodeName": "n"}, {}, None, 30),
        ({"nodeName": "n", "terminationGracePeriodSeconds": 5}, {}, None, 5),
        ({"nodeName": "n"}, {}, 0, 0),
        ({"nodeName": "n"}, {}, 7, 7),
        ({}, {}, None, 0),
        ({"nodeName": "n"}, {"phase": "Succeeded"}, None, 0),
    ],
)
def test_a_pods_grace(spec: dict[str, Any], status: dict[str, Any], requested: int | None, seconds: int) -> None:
    assert kind("Pod").grace_seconds({"spec": spec, "status": status}, requested) == seconds


def test_an_event_reads_alike_in_both_versions() -> None:
    old, new = kind("Event", ""), kind("Event", "events.k8s.io")
    stored = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": dict(META),
        "message": "hello",
        "involvedObject": {"kind": "Pod", "name": "p", "namespace": "shop"},
        "reportingComponent": "kubelet",
    }
    served = new.from_storage(stored)
    assert served["apiVersion"] == "events.k8s.io/v1"
    assert (served["note"], served["regarding"]["name"], served["reportingController"]) == ("hello", "p", "kubelet")
    assert new.to_storage(served) == stored
    assert old.from_storage(stored) == stored
    assert new.selectable_fields(served)["regarding.name"] == old.selectable_fields(stored)["involvedObject.name"] == "p"


def test_scale_is_read_and_written() -> None:
    deployment = created("Deployment", **DEPLOYMENT)
    deployment["status"] = {"replicas": 4}
    scale = kind("Deployment").scale_of(deployment)
    assert (scale["kind"], scale["spec"], scale["status"]) == ("Scale", {"replicas": 1}, {"replicas": 4, "selector": "app=web"})
    assert kind("Deployment").with_replicas(deployment, 7)["spec"]["replicas"] == 7
    assert deployment["spec"]["replicas"] == 1
