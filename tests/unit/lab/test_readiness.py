"""What keeps a cluster from being ready."""

from podwire.lab.readiness import (
    Workload,
    WorkloadSpec,
    WorkloadStatus,
    endpoint_obstacles,
    node_obstacle,
    pod_obstacle,
    service_obstacle,
    workload_obstacle,
)
from podwire.model.meta import ObjectMeta
from podwire.model.objects import (
    Condition,
    Endpoint,
    EndpointConditions,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    NodeStatus,
    ObjectReference,
    Pod,
    PodSpec,
    PodStatus,
    Service,
    ServiceSpec,
    ServiceStatus,
)

READY = (Condition(type="Ready", status="True"),)
LABELS = {"app": "web"}


def pod(name: str = "web-1", *, ready: bool = True, phase: str = "Running", node: str = "node-1", deleted: bool = False) -> Pod:
    meta = ObjectMeta(
        namespace="shop", name=name, uid=name, labels=LABELS, deletion_timestamp="2026-01-01T00:00:00Z" if deleted else None
    )
    return Pod(metadata=meta, spec=PodSpec(node_name=node), status=PodStatus(phase=phase, conditions=READY if ready else ()))


def service(kind: str = "ClusterIP", ip: str = "") -> Service:
    ingress = (LoadBalancerIngress(ip=ip),) if ip else ()
    return Service(
        metadata=ObjectMeta(namespace="shop", name="web"),
        spec=ServiceSpec(type=kind, selector=LABELS),
        status=ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress)),
    )


def piece(*uids: str, ready: bool | None = None) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(namespace="shop", name="web-x", labels={"kubernetes.io/service-name": "web"}),
        endpoints=tuple(
            Endpoint(addresses=("10.244.0.2",), target_ref=ObjectReference(uid=uid), conditions=EndpointConditions(ready=ready))
            for uid in uids
        ),
    )


def test_pods() -> None:
    assert pod_obstacle(pod()) == ""
    assert pod_obstacle(pod(ready=False)) == "pod shop/web-1 is not ready (on node-1, Running)"
    assert pod_obstacle(pod(ready=False, phase="", node="")) == "pod shop/web-1 is not ready (not scheduled, Pending)"
    assert pod_obstacle(pod(ready=False, phase="Succeeded")) == ""
    assert pod_obstacle(pod(ready=False, deleted=True)) == ""


def test_nodes() -> None:
    assert node_obstacle(Node(status=NodeStatus(conditions=READY))) == ""
    assert node_obstacle(Node(metadata=ObjectMeta(name="node-1"))) == "node node-1 is not ready"


def test_workloads() -> None:
    def workload(wanted: int, ready: int, seen: int) -> Workload:
        return Workload(
            metadata=ObjectMeta(namespace="shop", name="web", generation=2),
            spec=WorkloadSpec(replicas=wanted),
            status=WorkloadStatus(ready_replicas=ready, observed_generation=seen),
        )

    assert workload_obstacle(workload(3, 3, 2)) == ""
    assert workload_obstacle(workload(3, 2, 2)) == "shop/web has 2 of 3 pods ready"
    assert workload_obstacle(workload(3, 3, 1)) != "", "its controller has not seen the newest version"


def test_load_balancers() -> None:
    assert service_obstacle(service()) == ""
    assert service_obstacle(service("LoadBalancer", "203.0.113.1")) == ""
    assert service_obstacle(service("LoadBalancer")) == "service shop/web has no load-balancer address"


def test_ready_pods_have_to_be_endpoints() -> None:
    pods = [pod("a"), pod("b"), pod("c", ready=False), pod("d", deleted=True)]
    assert endpoint_obstacles(pods, [service()], [piece("a", "b")]) == []
    assert endpoint_obstacles(pods, [service()], [piece("a"), piece("b", ready=False)]) == [
        "service shop/web lacks 1 of 2 endpoints"
    ]
    assert endpoint_obstacles(pods, [service()], []) == ["service shop/web lacks 2 of 2 endpoints"]
    assert endpoint_obstacles(pods, [Service(metadata=ObjectMeta(namespace="shop", name="manual"))], []) == []
