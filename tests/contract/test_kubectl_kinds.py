"""The real kubectl on every kind: what it sends is taken, what it prints is what Kubernetes has it print."""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.store.memory import MemoryStore

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
pytestmark = [
    pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed"),
    pytest.mark.timeout(120),
]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Kubectl:
    """Runs kubectl against one server; its discovery cache is its own."""

    url: str
    home: Path

    async def run(self, line: str, stdin: str | Any = "") -> Ran:
        text = stdin if isinstance(stdin, str) else yaml.safe_dump(stdin)
        assert KUBECTL is not None
        process = await asyncio.create_subprocess_exec(
            KUBECTL,
            f"--server={self.url}",
            f"--cache-dir={self.home}/cache",
            *line.split(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"HOME": str(self.home), "PATH": os.defpath},
        )
        out, err = await process.communicate(text.encode())
        return Ran(process.returncode or 0, out.decode(), err.decode())

    async def __call__(self, line: str, stdin: str | Any = "") -> str:
        """Standard output of a command that must succeed."""
        ran = await self.run(line, stdin)
        assert ran.code == 0, f"kubectl {line}: {ran.out}{ran.err}"
        return ran.out

    async def fails(self, line: str, stdin: str | Any = "") -> str:
        """Standard error of a command that must fail."""
        ran = await self.run(line, stdin)
        assert ran.code != 0, f"kubectl {line} succeeded: {ran.out}"
        return ran.err

    async def get(self, what: str) -> Any:
        return json.loads(await self(f"get {what} -o json"))


@asynccontextmanager
async def serving(store: MemoryStore, home: Path) -> AsyncIterator[Kubectl]:
    """An API server over `store`, of both families."""
    config = ServerConfig(service_cidrs=(ip_network("10.96.0.0/12"), ip_network("fd00:10:96::/112")))
    server = ApiServer(create_app(store, config))
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    await server.start([Listener(sock)])
    try:
        yield Kubectl(url, home)
    finally:
        await server.stop()


@pytest.fixture
async def kubectl(tmp_path: Path) -> AsyncIterator[Kubectl]:
    store = MemoryStore()
    async with serving(store, tmp_path) as kubectl:
        yield kubectl
    await store.close()


DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "api", "labels": {"app": "api", "tier": "one"}},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "api"}},
        "template": {
            "metadata": {"labels": {"app": "api"}},
            "spec": {
                "containers": [
                    {
                        "name": "api",
                        "image": "nginx:1.25",
                        "ports": [{"containerPort": 80, "name": "http"}],
                        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                        "readinessProbe": {"httpGet": {"port": "http"}},
                    },
                    {"name": "side", "image": "busybox:1", "command": ["sleep", "1"]},
                ],
                "volumes": [{"name": "tmp", "emptyDir": {}}],
            },
        },
    },
}


def changed(**spec: Any) -> Any:
    """The Deployment with another label, one container and one variable less, and whatever `spec` says."""
    new = json.loads(json.dumps(DEPLOYMENT))
    new["metadata"]["labels"]["tier"] = "two"
    del new["spec"]["template"]["spec"]["containers"][1]
    del new["spec"]["template"]["spec"]["containers"][0]["env"][1]
    new["spec"] |= spec
    return new


async def test_create_sends_protobuf_and_is_understood(kubectl: Kubectl) -> None:
    assert await kubectl("create namespace shop") == "namespace/shop created\n"
    await kubectl("create deployment web --image=nginx --replicas=3 --port=8080 -n shop")
    await kubectl("create service nodeport web --tcp=80:8080 --node-port=30080 -n shop")
    await kubectl("create configmap cfg --from-literal=a=1 -n shop")
    await kubectl("create secret generic sec --from-literal=a=1 -n shop")
    await kubectl("create serviceaccount robot -n shop")
    deployment = await kubectl.get("deployment web -n shop")
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["template"]["spec"]["containers"][0]["ports"] == [{"containerPort": 8080, "protocol": "TCP"}]
    assert deployment["spec"]["progressDeadlineSeconds"] == 600
    service = await kubectl.get("service web -n shop")
    ports = [{"name": "80-8080", "port": 80, "targetPort": 8080, "protocol": "TCP", "nodePort": 30080}]
    assert service["spec"]["ports"] == ports
    assert service["spec"]["selector"] == {"app": "web"}
    assert (await kubectl.get("configmap cfg -n shop"))["data"] == {"a": "1"}
    assert (await kubectl.get("secret sec -n shop"))["data"] == {"a": "MQ=="}
    zero = await kubectl("create deployment none --image=nginx --replicas=0 -n shop -o json")
    assert json.loads(zero)["spec"]["replicas"] == 0


async def test_the_columns_are_kubectls(kubectl: Kubectl) -> None:
    await kubectl("create deployment web --image=nginx --replicas=3")
    await kubectl("expose deployment web --port=80 --target-port=8080 --type=NodePort")
    await kubectl("run solo --image=busybox --port=80 -- sleep 1")
    lines = (await kubectl("get deployments -o wide")).splitlines()
    assert lines[0].split() == ["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE", "CONTAINERS", "IMAGES", "SELECTOR"]
    assert lines[1].split()[:4] == ["web", "0/3", "0", "0"]
    lines = (await kubectl("get pods -o wide")).splitlines()
    wide = ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE", "NOMINATED", "NODE", "READINESS", "GATES"]
    assert lines[0].split() == wide
    assert lines[1].split()[:4] == ["solo", "0/1", "Pending", "0"]
    lines = (await kubectl("get services web")).splitlines()
    assert lines[0].split() == ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE"]
    assert lines[1].split()[1] == "NodePort"
    names = (await kubectl("get all -o name")).split()
    assert {"pod/solo", "service/kubernetes", "service/web", "deployment.apps/web"} <= set(names)


async def test_client_side_apply_merges_three_ways(kubectl: Kubectl) -> None:
    assert await kubectl("apply -f -", DEPLOYMENT) == "deployment.apps/api created\n"
    assert await kubectl("apply -f -", DEPLOYMENT) == "deployment.apps/api unchanged\n"
    await kubectl("label deployment api added=by-hand")
    assert await kubectl("apply -f -", changed()) == "deployment.apps/api configured\n"
    live = await kubectl.get("deployment api")
    assert live["metadata"]["labels"] == {"app": "api", "tier": "two", "added": "by-hand"}
    (container,) = live["spec"]["template"]["spec"]["containers"]
    assert (container["image"], container["env"]) == ("nginx:1.25", [{"name": "A", "value": "1"}])
    assert container["readinessProbe"]["periodSeconds"] == 10


@pytest.mark.skipif(shutil.which("diff", path=os.defpath) is None, reason="diff is not installed")
async def test_diff_shows_what_apply_would_change_and_nothing_else(kubectl: Kubectl) -> None:
    await kubectl("apply -f -", DEPLOYMENT)
    assert await kubectl("diff -f -", DEPLOYMENT) == ""
    ran = await kubectl.run("diff -f -", changed())
    assert ran.code == 1
    lines = [line for line in ran.out.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert {"-    tier: one", "+    tier: two", "-        - name: B"} <= {
        line.replace("  name: B", "- name: B") for line in lines
    }
    assert (await kubectl.get("deployment api"))["metadata"]["labels"]["tier"] == "one"


async def test_server_side_apply_conflicts_and_force(kubectl: Kubectl) -> None:
    await kubectl("apply --server-side -f -", DEPLOYMENT)
    await kubectl("scale deployment api --replicas=7")
    said = await kubectl.fails("apply --server-side --field-manager=ci -f -", changed(replicas=3))
    assert 'conflicts with "kubectl" with subresource "scale" using apps/v1:\n- .spec.replicas' in said
    assert 'conflicts with "kubectl":\n- .metadata.labels.tier' in said
    await kubectl("apply --server-side --field-manager=ci --force-conflicts -f -", changed(replicas=3))
    live = await kubectl.get("deployment api --show-managed-fields")
    assert live["spec"]["replicas"] == 3
    managers = {entry["manager"]: entry["operation"] for entry in live["metadata"]["managedFields"]}
    assert managers == {"kubectl": "Apply", "ci": "Apply"}
    less = changed()
    del less["spec"]["template"]["spec"]["volumes"], less["metadata"]["labels"]["tier"]
    await kubectl("apply --server-side --field-manager=ci -f -", less)
    live = await kubectl.get("deployment api")
    assert live["spec"]["template"]["spec"]["volumes"], "kubectl still applies the volumes"
    assert "tier" not in live["metadata"]["labels"], "nobody applies the label any more"


async def test_moving_from_client_side_to_server_side_apply(kubectl: Kubectl) -> None:
    await kubectl("apply -f -", DEPLOYMENT)
    await kubectl("apply --server-side -f -", changed())
    live = await kubectl.get("deployment api")
    assert live["metadata"]["labels"]["tier"] == "two"


async def test_the_three_patches(kubectl: Kubectl) -> None:
    await kubectl("create service clusterip web --tcp=80:8080")
    await kubectl('patch service web -p {"spec":{"ports":[{"port":443,"name":"tls"}]}}')
    assert [p["port"] for p in (await kubectl.get("service web"))["spec"]["ports"]] == [443, 80]
    await kubectl('patch service web --type=merge -p {"spec":{"ports":[{"port":81}]}}')
    assert [p["port"] for p in (await kubectl.get("service web"))["spec"]["ports"]] == [81]
    await kubectl('patch service web --type=json -p [{"op":"replace","path":"/spec/ports/0/port","value":82}]')
    assert [p["port"] for p in (await kubectl.get("service web"))["spec"]["ports"]] == [82]
    assert "the path /spec/none does not exist" in await kubectl.fails(
        'patch service web --type=json -p [{"op":"remove","path":"/spec/none"}]'
    )


async def test_a_service_changes_its_type_and_families(kubectl: Kubectl) -> None:
    await kubectl("create service clusterip web --tcp=80:8080")
    address = (await kubectl.get("service web"))["spec"]["clusterIP"]
    await kubectl('patch service web -p {"spec":{"type":"LoadBalancer","ipFamilyPolicy":"PreferDualStack"}}')
    spec = (await kubectl.get("service web"))["spec"]
    assert spec["ports"][0]["nodePort"] in range(30000, 32768)
    assert spec["clusterIPs"][0] == address
    assert spec["clusterIPs"][1].startswith("fd00:10:96::")
    assert "<pending>" in await kubectl("get service web")
    await kubectl('patch service web -p {"spec":{"type":"ClusterIP","ipFamilyPolicy":"SingleStack"}}')
    spec = (await kubectl.get("service web"))["spec"]
    assert (spec["clusterIPs"], spec["ipFamilies"]) == ([address], ["IPv4"])
    assert "nodePort" not in spec["ports"][0]
    await kubectl("create service externalname out --external-name=example.com")
    assert "example.com" in await kubectl("get service out")


async def test_addresses_are_given_once_also_in_parallel(kubectl: Kubectl) -> None:
    wanted = [f"create service clusterip web{n} --tcp=80:80 --clusterip=10.96.0.77" for n in range(4)]
    ran = await asyncio.gather(*(kubectl.run(line) for line in wanted))
    assert sorted(r.code for r in ran) == [0, 1, 1, 1]
    assert all("provided IP is already allocated" in r.err for r in ran if r.code)
    await asyncio.gather(*(kubectl(f"create service nodeport port{n} --tcp=80:80") for n in range(8)))
    services = (await kubectl.get("services"))["items"]
    ports = [p["nodePort"] for s in services for p in s["spec"]["ports"] if "nodePort" in p]
    assert len(set(ports)) == 8
    assert len({s["spec"]["clusterIP"] for s in services}) == len(services)


async def test_what_is_taken_stays_taken_over_a_restart_and_is_free_after_deletion(tmp_path: Path) -> None:
    store = MemoryStore()
    wish = "create service nodeport {} --tcp=80:80 --node-port=30080"
    async with serving(store, tmp_path / "one") as kubectl:
        await kubectl(wish.format("first"))
        address = (await kubectl.get("service first"))["spec"]["clusterIP"]
    async with serving(store, tmp_path / "two") as kubectl:
        assert "provided port is already allocated" in await kubectl.fails(wish.format("second"))
        taken = f"create service clusterip second --tcp=80:80 --clusterip={address}"
        assert "provided IP is already allocated" in await kubectl.fails(taken)
        await kubectl("delete service first")
        await kubectl(wish.format("second"))
        await kubectl(taken.replace("second", "third"))
    await store.close()


async def test_labels_scale_image_env_and_restart(kubectl: Kubectl) -> None:
    await kubectl("apply -f -", DEPLOYMENT)
    await kubectl("annotate deployment api note=x")
    await kubectl("set image deployment/api api=nginx:1.27")
    await kubectl("set env deployment/api C=3")
    await kubectl("rollout restart deployment/api")
    await kubectl("label deployment api tier-")
    live = await kubectl.get("deployment api")
    template = live["spec"]["template"]
    assert template["spec"]["containers"][0]["image"] == "nginx:1.27"
    assert {"name": "C", "value": "3"} in template["spec"]["containers"][0]["env"]
    assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
    assert live["metadata"]["labels"] == {"app": "api"}
    assert live["metadata"]["generation"] == 4


async def test_explain_and_api_resources(kubectl: Kubectl) -> None:
    said = await kubectl("explain pod.spec.containers")
    assert "FIELD: containers <[]Container>" in said
    assert "name\t<string> -required-" in said
    assert "rollingUpdate\t<RollingUpdateDeployment>" in await kubectl("explain deployment.spec.strategy --recursive")
    said = await kubectl("api-resources")
    assert ["services", "svc", "v1", "true", "Service"] in [line.split() for line in said.splitlines()]


async def test_describe(kubectl: Kubectl) -> None:
    await kubectl("apply -f -", DEPLOYMENT)
    await kubectl("expose deployment api --port=80")
    await kubectl("run solo --image=busybox")
    said = await kubectl("describe deployment api")
    assert "RollingUpdateStrategy:  25% max unavailable, 25% max surge" in said
    assert "IP Families:              IPv4" in await kubectl("describe service api")
    assert "QoS Class:        BestEffort" in await kubectl("describe pod solo")
    assert "Status:       Active" in await kubectl("describe namespace default")


def service_with(**spec: Any) -> Any:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bad"}, "spec": spec}


async def test_wrong_input_is_told_by_field(kubectl: Kubectl) -> None:
    said = await kubectl.fails("apply -f -", service_with(ports=[{"port": 70000}]))
    assert "* spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive" in said
    said = await kubectl.fails("apply -f -", service_with(ports=[{"port": 80}], clusterIP="10.96.0.1"))
    assert said == (
        'The Service "bad" is invalid: spec.clusterIPs: Invalid value: ["10.96.0.1"]: '
        "failed to allocate IP 10.96.0.1: provided IP is already allocated\n"
    )
    said = await kubectl.fails("apply -f -", service_with(ports=[{"port": 80}], clusterIP="172.16.0.1"))
    assert "is not in the valid range. The range of valid IPs is 10.96.0.0/12" in said
    said = await kubectl.fails("apply -f -", service_with(ports=[{"port": 80, "nodePort": 80}], type="NodePort"))
    assert "provided port is not in the valid range. The range of valid ports is 30000-32767" in said
    said = await kubectl.fails("create namespace Bad_Name")
    assert 'metadata.name: Invalid value: "Bad_Name": a lowercase RFC 1123 label must consist of' in said


async def test_unknown_fields_and_wrong_types(kubectl: Kubectl) -> None:
    said = await kubectl.fails("apply -f -", service_with(ports=[{"port": 80, "prot": 1}], foo=1))
    assert 'strict decoding error: unknown field "spec.foo", unknown field "spec.ports[0].prot"' in said
    warned = await kubectl.run("apply --validate=warn -f -", service_with(ports=[{"port": 80}], foo=1))
    assert warned.code == 0
    assert 'Warning: unknown field "spec.foo"' in warned.err
    said = await kubectl.fails("apply -f -", changed(replicas="many"))
    assert (
        'Deployment in version "v1" cannot be handled as a Deployment: '
        "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32" in said
    )


async def test_what_may_not_change(kubectl: Kubectl) -> None:
    await kubectl("apply -f -", DEPLOYMENT)
    await kubectl("run solo --image=busybox:1 -- sleep 1")
    assert "field is immutable" in await kubectl.fails(
        'patch deployment api -p {"spec":{"selector":{"matchLabels":{"x":"y"}}}}'
    )
    assert "pod updates may not change fields other than" in await kubectl.fails('patch pod solo -p {"spec":{"hostname":"x"}}')
    await kubectl("set image pod/solo solo=busybox:2")
    said = await kubectl.fails('patch service kubernetes -p {"spec":{"clusterIP":"10.96.0.9"}}')
    assert (
        said
        == 'The Service "kubernetes" is invalid: spec.clusterIPs[0]: Invalid value: ["10.96.0.9"]: may not change once set\n'
    )


async def test_events_are_one_store_with_two_faces(kubectl: Kubectl) -> None:
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": "e1", "namespace": "default"},
        "regarding": {"kind": "Pod", "name": "p", "namespace": "default"},
        "note": "hello",
        "reason": "Tested",
        "type": "Normal",
        "action": "Test",
        "eventTime": "2024-01-01T00:00:00.000000Z",
        "reportingController": "me",
        "reportingInstance": "me-1",
    }
    await kubectl("create -f -", event)
    assert (await kubectl.get("events e1"))["message"] == "hello"
    assert (await kubectl.get("events.events.k8s.io e1"))["note"] == "hello"
    assert (await kubectl("get events")).splitlines()[1].split()[1:] == ["Normal", "Tested", "pod/p", "hello"]
    assert "Tested" in await kubectl("get events --field-selector=involvedObject.name=p")


async def test_nodes_and_status_writes(kubectl: Kubectl) -> None:
    await kubectl("create -f -", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    await kubectl("cordon n1")
    await kubectl("taint node n1 a=b:NoSchedule")
    assert (await kubectl("get nodes")).splitlines()[1].split()[:3] == ["n1", "Unknown,SchedulingDisabled", "<none>"]
    await kubectl("run solo --image=nginx:1")
    status = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "solo"},
        "status": {"phase": "Running", "podIP": "10.244.0.9"},
    }
    await kubectl("replace --subresource=status -f -", status)
    pod = await kubectl.get("pod solo")
    assert pod["status"]["podIPs"] == [{"ip": "10.244.0.9"}]
    assert pod["spec"]["containers"][0]["image"] == "nginx:1"


async def test_unknown_kinds_are_named(kubectl: Kubectl) -> None:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": {}}
    assert 'no matches for kind "Job" in version "batch/v1"' in await kubectl.fails("apply -f -", job)
    assert 'the server doesn\'t have a resource type "cronjobs"' in await kubectl.fails("get cronjobs")


async def test_server_side_dry_run_changes_nothing(kubectl: Kubectl) -> None:
    made = json.loads(await kubectl("run solo --image=nginx --dry-run=server -o json"))
    assert made["spec"]["containers"][0]["imagePullPolicy"] == "Always"
    await kubectl("create service nodeport web --tcp=80:80 --node-port=30080 --dry-run=server")
    await kubectl("create service nodeport web --tcp=80:80 --node-port=30080")
    assert 'pods "solo" not found' in await kubectl.fails("get pod solo")


async def test_ranges_and_addresses_of_services(kubectl: Kubectl) -> None:
    more = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "more"},
        "spec": {"cidrs": ["10.112.0.0/24"]},
    }
    assert await kubectl("create -f -", more) == "servicecidr.networking.k8s.io/more created\n"
    assert "field is immutable" in await kubectl.fails("apply -f -", {**more, "spec": {"cidrs": ["10.113.0.0/24"]}})
    await kubectl("create service clusterip web --tcp=80 --clusterip=10.112.0.3")
    lines = [line.split() for line in (await kubectl("get servicecidrs")).splitlines()]
    assert lines[0] == ["NAME", "CIDRS", "AGE"]
    assert [line[:2] for line in lines[1:]] == [["kubernetes", "10.96.0.0/12,fd00:10:96::/112"], ["more", "10.112.0.0/24"]]
    assert [line.split() for line in (await kubectl("get ip")).splitlines()] == [
        ["NAME", "PARENTREF"],
        ["10.112.0.3", "services/default/web"],
        ["10.96.0.1", "services/default/kubernetes"],
    ]
    assert "10.112.0.3" in await kubectl("get ipaddresses -l ipaddress.kubernetes.io/ip-family=IPv4 -o name")
    assert "GROUP:      networking.k8s.io" in await kubectl("explain ipaddress.spec.parentRef")
    assert "cidrs" in await kubectl("explain servicecidr.spec")
    assert "Parent Ref" in await kubectl("describe ipaddress 10.112.0.3")
    assert "10.112.0.0/24" in await kubectl("describe servicecidr more")
    await kubectl("delete servicecidr more --wait=false")
    assert (await kubectl.get("servicecidr more"))["metadata"]["deletionTimestamp"]
    resources = await kubectl("api-resources --api-group=networking.k8s.io --no-headers")
    assert [line.split() for line in resources.splitlines()] == [
        ["ipaddresses", "ip", "networking.k8s.io/v1", "false", "IPAddress"],
        ["servicecidrs", "networking.k8s.io/v1", "false", "ServiceCIDR"],
    ]
