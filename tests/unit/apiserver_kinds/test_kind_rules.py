"""Wrong input is refused with the field and the words that Kubernetes uses."""

from datetime import UTC, datetime
from typing import Any

import pytest

from podwire.apiserver.kinds import REGISTRY

NOW = datetime(2024, 1, 1, tzinfo=UTC)
PORT = "must be between 1 and 65535, inclusive"


def problems(name: str, document: dict[str, Any]) -> list[str]:
    kind = next(k for k in REGISTRY if k.resource.kind == name)
    document = {"metadata": {"name": "web", "namespace": "shop"}, **document}
    return [str(e) for e in kind.validate(kind.prepare_create(kind.fit(document).document, NOW))]


def container(**parts: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "c", "image": "x", **parts}]}}


def pod(**spec: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "c", "image": "x"}], **spec}}


def service(**spec: Any) -> dict[str, Any]:
    return {"spec": {"ports": [{"port": 80}], **spec}}


def deployment(**spec: Any) -> dict[str, Any]:
    template = {"metadata": {"labels": {"a": "b"}}, **pod()}
    return {"spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template, **spec}}


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("Pod", pod()),
        ("Service", service()),
        ("Deployment", deployment()),
        ("Service", {"spec": {"clusterIP": "None"}}),
        ("Service", {"spec": {"type": "ExternalName", "externalName": "example.com."}}),
        ("EndpointSlice", {"addressType": "IPv6", "endpoints": [{"addresses": ["fd00::1"]}], "ports": [{"port": 80}]}),
        ("Lease", {"spec": {"leaseDurationSeconds": 40, "holderIdentity": "n"}}),
        ("ConfigMap", {"data": {"key.name": "x"}, "binaryData": {"b": "AA=="}}),
    ],
)
def test_good_documents_pass(name: str, document: dict[str, Any]) -> None:
    assert problems(name, document) == []


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"spec": {}}, "spec.containers: Required value"),
        (container(name=""), "spec.containers[0].name: Required value"),
        (container(image=""), "spec.containers[0].image: Required value"),
        (container(image=" x"), 'spec.containers[0].image: Invalid value: " x": must not have leading or trailing whitespace'),
        (
            container(ports=[{"containerPort": 70000}]),
            f"spec.containers[0].ports[0].containerPort: Invalid value: 70000: {PORT}",
        ),
        (container(ports=[{}]), "spec.containers[0].ports[0].containerPort: Required value"),
        (
            container(ports=[{"containerPort": 1, "name": "a"}, {"containerPort": 2, "name": "a"}]),
            'spec.containers[0].ports[1].name: Duplicate value: "a"',
        ),
        (
            container(ports=[{"containerPort": 1, "name": "averyveryverylongname"}]),
            'spec.containers[0].ports[0].name: Invalid value: "averyveryverylongname": must be no more than 15 characters',
        ),
        (
            container(ports=[{"containerPort": 1, "protocol": "ICMP"}]),
            'spec.containers[0].ports[0].protocol: Unsupported value: "ICMP": supported values: "SCTP", "TCP", "UDP"',
        ),
        (
            container(ports=[{"containerPort": 1, "hostPort": 5}, {"containerPort": 2, "hostPort": 5}]),
            'spec.containers[0].ports[1].hostPort: Duplicate value: "TCP//5"',
        ),
        (container(env=[{"name": ""}]), "spec.containers[0].env[0].name: Required value"),
        (
            container(env=[{"name": "A", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]),
            'spec.containers[0].env[0].valueFrom: Invalid value: "": may not be specified when `value` is not empty',
        ),
        (container(volumeMounts=[{"name": "v", "mountPath": "/v"}]), 'spec.containers[0].volumeMounts[0].name: Not found: "v"'),
        (container(livenessProbe={}), "spec.containers[0].livenessProbe: Required value: must specify a handler type"),
        (
            container(livenessProbe={"tcpSocket": {"port": 1}, "successThreshold": 2}),
            "spec.containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1",
        ),
        (
            container(readinessProbe={"httpGet": {"port": 0}}),
            f"spec.containers[0].readinessProbe.httpGet.port: Invalid value: 0: {PORT}",
        ),
        (
            container(resources={"requests": {"cpu": "2"}, "limits": {"cpu": "1500m"}}),
            'spec.containers[0].resources.requests: Invalid value: "2": must be less than or equal to cpu limit of 1500m',
        ),
        (
            container(restartPolicy="Always"),
            "spec.containers[0].restartPolicy: Forbidden: may not be set for non-init containers",
        ),
        (
            pod(restartPolicy="Maybe"),
            'spec.restartPolicy: Unsupported value: "Maybe": supported values: "Always", "Never", "OnFailure"',
        ),
        (pod(hostname="A"), 'spec.hostname: Invalid value: "A": a lowercase RFC 1123 label must consist of'),
        (
            pod(terminationGracePeriodSeconds=-1),
            "spec.terminationGracePeriodSeconds: Invalid value: -1: must be greater than or equal to 0",
        ),
        (pod(volumes=[{"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}}]), "may not specify more than 1 volume type"),
        (pod(volumes=[{"name": "v", "configMap": {}}]), "spec.volumes[0].configMap.name: Required value"),
        (pod(volumes=[{"name": "v"}, {"name": "v"}]), 'spec.volumes[1].name: Duplicate value: "v"'),
        (pod(initContainers=[{"name": "c", "image": "x"}]), 'spec.initContainers[0].name: Duplicate value: "c"'),
        (
            pod(tolerations=[{"operator": "Equal"}]),
            'spec.tolerations[0].operator: Invalid value: "Equal": operator must be Exists',
        ),
        (pod(hostAliases=[{"ip": "x"}]), 'spec.hostAliases[0].ip: Invalid value: "x": must be a valid IP address'),
        (pod(dnsPolicy="None"), "spec.dnsConfig.nameservers: Required value: must provide at least one DNS nameserver"),
    ],
)
def test_pods(document: dict[str, Any], says: str) -> None:
    assert any(line.startswith(says) or says in line for line in problems("Pod", document))


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"spec": {}}, "spec.ports: Required value"),
        (service(ports=[{"port": 70000}]), f"spec.ports[0].port: Invalid value: 70000: {PORT}"),
        (service(ports=[{"port": 0}]), f"spec.ports[0].port: Invalid value: 0: {PORT}"),
        (service(ports=[{"port": 80}, {"port": 81}]), "spec.ports[0].name: Required value"),
        (service(ports=[{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]), 'spec.ports[1].name: Duplicate value: "a"'),
        (
            service(ports=[{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]),
            'spec.ports[1]: Duplicate value: {"protocol":"TCP","port":80}',
        ),
        (
            service(ports=[{"port": 80, "nodePort": 30000}]),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (service(ports=[{"port": 80, "targetPort": "-"}]), 'spec.ports[0].targetPort: Invalid value: "-"'),
        (
            service(type="Foo"),
            'spec.type: Unsupported value: "Foo": supported values: "ClusterIP", "ExternalName", "LoadBalancer", "NodePort"',
        ),
        (service(type="NodePort", clusterIP="None"), "may not be set to 'None' for NodePort services"),
        (service(type="ExternalName"), "spec.externalName: Required value"),
        (
            service(clusterIP="10.0.0"),
            'spec.clusterIPs[0]: Invalid value: "10.0.0": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)',
        ),
        (
            service(clusterIPs=["10.0.0.1", "10.0.0.2"], clusterIP="10.0.0.1"),
            "may specify no more than one IP for each IP family",
        ),
        (service(clusterIPs=["10.0.0.1"], clusterIP="10.0.0.2"), "first value must match `clusterIP`"),
        (service(ipFamilies=["IPv5"]), 'spec.ipFamilies[0]: Unsupported value: "IPv5": supported values: "IPv4", "IPv6"'),
        (service(sessionAffinity="x"), 'spec.sessionAffinity: Unsupported value: "x": supported values: "ClientIP", "None"'),
        (
            service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 100000}}),
            "timeoutSeconds: Invalid value: 100000: must be greater than 0 and less than 86400",
        ),
        (service(externalTrafficPolicy="Local"), "may only be set for externally-accessible services"),
        (service(internalTrafficPolicy="x"), 'spec.internalTrafficPolicy: Unsupported value: "x"'),
        (service(externalIPs=["127.0.0.1"]), "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
        (
            service(loadBalancerSourceRanges=["10.0.0.0/8"]),
            "spec.loadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            service(type="LoadBalancer", loadBalancerSourceRanges=["x"]),
            "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
        ),
        (
            service(healthCheckNodePort=30000),
            "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
        ),
        (
            {"metadata": {"name": "1web", "namespace": "shop"}, **service()},
            'metadata.name: Invalid value: "1web": a DNS-1035 label must',
        ),
    ],
)
def test_services(document: dict[str, Any], says: str) -> None:
    assert any(says in line for line in problems("Service", document))


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (deployment(replicas=-1), "spec.replicas: Invalid value: -1: must be greater than or equal to 0"),
        (deployment(selector=None), "spec.selector: Required value"),
        (deployment(selector={}), "spec.selector: Invalid value: {}: empty selector is invalid for deployment"),
        (
            deployment(selector={"matchLabels": {"a": "c"}}),
            'spec.template.metadata.labels: Invalid value: {"a":"b"}: `selector` does not match template `labels`',
        ),
        (
            deployment(selector={"matchExpressions": [{"key": "a", "operator": "In"}]}),
            "spec.selector.matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'",
        ),
        (
            deployment(strategy={"type": "Foo"}),
            'spec.strategy.type: Unsupported value: "Foo": supported values: "Recreate", "RollingUpdate"',
        ),
        (
            deployment(strategy={"type": "Recreate", "rollingUpdate": {}}),
            "spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type` is 'Recreate'",
        ),
        (
            deployment(strategy={"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}),
            'spec.strategy.rollingUpdate.maxUnavailable: Invalid value: "0%": may not be 0 when `maxSurge` is 0',
        ),
        (deployment(strategy={"rollingUpdate": {"maxSurge": "many"}}), "a valid percent string must be a numeric string"),
        (
            deployment(minReadySeconds=600),
            "spec.progressDeadlineSeconds: Invalid value: 600: must be greater than minReadySeconds",
        ),
        (
            deployment(template={"metadata": {"labels": {"a": "b"}}, **pod(restartPolicy="Never")}),
            'spec.template.spec.restartPolicy: Unsupported value: "Never": supported values: "Always"',
        ),
    ],
)
def test_deployments(document: dict[str, Any], says: str) -> None:
    assert any(says in line for line in problems("Deployment", document))


@pytest.mark.parametrize(
    ("name", "document", "says"),
    [
        ("ConfigMap", {"data": {"a b": "x"}}, 'data[a b]: Invalid value: "a b": a valid config key must consist of'),
        ("ConfigMap", {"data": {"a": "x"}, "binaryData": {"a": "eA=="}}, "duplicate of key present in binaryData"),
        ("ConfigMap", {"data": {"a": "x" * 1048577}}, "Too long: may not be more than 1048576 bytes"),
        ("Secret", {"type": "kubernetes.io/tls"}, "data[tls.crt]: Required value"),
        ("EndpointSlice", {"endpoints": [{"addresses": ["10.0.0.1"]}]}, "addressType: Required value"),
        ("EndpointSlice", {"addressType": "IPv6", "endpoints": [{"addresses": ["10.0.0.1"]}]}, "must be an IPv6 address"),
        ("EndpointSlice", {"addressType": "IPv4", "endpoints": [{}]}, "endpoints[0].addresses: Required value"),
        ("Lease", {"spec": {"leaseDurationSeconds": 0}}, "spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0"),
        ("Node", {"spec": {"podCIDRs": ["x"]}}, 'spec.podCIDRs[0]: Invalid value: "x": must be a valid CIDR value'),
        ("Node", {"spec": {"taints": [{"key": "a", "effect": "x"}]}}, 'spec.taints[0].effect: Unsupported value: "x"'),
        ("Event", {"involvedObject": {"namespace": "other"}}, "does not match event.namespace"),
        ("Namespace", {"metadata": {"name": "a.b"}}, 'metadata.name: Invalid value: "a.b": a lowercase RFC 1123 label must'),
    ],
)
def test_the_other_kinds(name: str, document: dict[str, Any], says: str) -> None:
    assert any(says in line for line in problems(name, document))


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"name": "x" * 254}, "must be no more than 253 bytes"),
        ({"name": ""}, "metadata.name: Required value: name or generateName is required"),
        ({"labels": {"a/b/c": "x"}}, 'metadata.labels: Invalid value: "a/b/c": a qualified name must consist of'),
        (
            {"labels": {"a": "b c"}},
            'metadata.labels: Invalid value: "b c": a valid label must be an empty string or consist of',
        ),
        ({"labels": {"/a": "b"}}, "prefix part must be non-empty"),
        ({"annotations": {"a": "x" * 262144}}, "metadata.annotations: Too long: may not be more than 262144 bytes"),
        ({"ownerReferences": [{"kind": "Pod"}]}, "metadata.ownerReferences[0].uid: Invalid value"),
    ],
)
def test_metadata(meta: dict[str, Any], says: str) -> None:
    assert any(says in line for line in problems("ConfigMap", {"metadata": {"name": "web", "namespace": "shop", **meta}}))
