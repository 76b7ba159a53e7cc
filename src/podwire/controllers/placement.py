"""Which node for which pod. Pure: pending pods, nodes and the pods that run already, to decisions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from podwire.controllers.affinity import PodAffinities, node_affinity_allows
from podwire.controllers.documents import WorkloadPod
from podwire.model.ids import ObjectKey
from podwire.model.objects import Node, Pod, Taint, Toleration, TopologySpread

UNSCHEDULABLE = Taint(key="node.kubernetes.io/unschedulable", effect="NoSchedule")
DEFAULT_POD_CAPACITY = 110

HostPort = tuple[str, str, int]
"""(address or "", protocol, port) that a pod claims on its node."""


@dataclass(slots=True)
class NodeLoad:
    """A node as the pods on it leave it."""

    node: Node
    capacity: int
    pods: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    host_ports: set[HostPort] = field(default_factory=set)
    members: list[WorkloadPod] = field(default_factory=list)

    def add(self, pod: WorkloadPod) -> None:
        self.pods += 1
        self.groups[group_of(pod)] += 1
        self.host_ports |= host_ports(pod)
        self.members.append(pod)


@dataclass(frozen=True, slots=True)
class Placement:
    """`node` for the pod `key`, or (node "") why there is none."""

    key: ObjectKey
    node: str
    reason: str = ""


def place_pods(pending: Sequence[WorkloadPod], nodes: Iterable[Node], running: Iterable[WorkloadPod]) -> list[Placement]:
    """A decision for each pod of `pending`, in that order, each taking those before it into account.

    A node fits by: Ready, schedulable, taints tolerated, nodeSelector and affinities, host ports free, pod capacity, hard
    topology spread. Of those that fit, the one that its preferences speak for, then the one with the fewest pods of the same
    owner, then the fewest pods, then the first by name. Requests for CPU and memory do not count: a node's pods share it.
    """
    loads = {node.metadata.name: NodeLoad(node, _capacity(node)) for node in sorted(nodes, key=lambda n: n.metadata.name)}
    for pod in running:
        load = loads.get(pod.spec.node_name)
        if load is not None and not pod.finished:
            load.add(pod)
    return [_place_safely(pod, loads) for pod in pending]


def _place_safely(pod: WorkloadPod, loads: Mapping[str, NodeLoad]) -> Placement:
    """A pod that no rule of the API allows (an unknown selector operator) waits, and does not hold up the others."""
    try:
        return _place(pod, loads)
    except ValueError as error:
        return Placement(pod.key, "", str(error))


def _place(pod: WorkloadPod, loads: Mapping[str, NodeLoad]) -> Placement:
    refused: Counter[str] = Counter()
    fitting: list[NodeLoad] = []
    spreads = [_Spread(rule, pod, loads) for rule in pod.spec.topology_spread_constraints if _hard(rule)]
    affinities = PodAffinities(pod, [(load.node, load.members) for load in loads.values()])
    wanted_ports, group = host_ports(pod), group_of(pod)
    for load in loads.values():
        reason = _refusal(pod, load, wanted_ports) or affinities.refusal(load.node)
        reason = reason or next((r for s in spreads if (r := s.refusal(load.node))), "")
        if reason:
            refused[reason] += 1
        else:
            fitting.append(load)
    if not fitting:
        return Placement(pod.key, "", _explain(refused, len(loads)))
    best = min(fitting, key=lambda load: (-affinities.score(load.node), load.groups[group], load.pods, load.node.metadata.name))
    best.add(pod)
    return Placement(pod.key, best.node.metadata.name)


def _refusal(pod: WorkloadPod, load: NodeLoad, wanted_ports: set[HostPort]) -> str:
    """Why the pod cannot go there, in kube-scheduler's words; empty if it can."""
    node = load.node
    if not node.ready:
        return "node(s) were not ready"
    if node.spec.unschedulable and not tolerates(pod.spec.tolerations, UNSCHEDULABLE):
        return "node(s) were unschedulable"
    for taint in node.spec.taints:
        if taint.effect in ("NoSchedule", "NoExecute") and not tolerates(pod.spec.tolerations, taint):
            return f"node(s) had untolerated taint {{{taint.key}: {taint.value}}}"
    if _outside(pod, node):
        return "node(s) didn't match Pod's node affinity/selector"
    if wanted_ports and any(_ports_clash(wanted, used) for wanted in wanted_ports for used in load.host_ports):
        return "node(s) didn't have free ports for the requested pod ports"
    if load.pods >= load.capacity:
        return "Too many pods"
    return ""


def _explain(refused: Counter[str], nodes: int) -> str:
    if not nodes:
        return "no nodes available to schedule pods"
    reasons = ", ".join(sorted(f"{count} {reason}" for reason, count in refused.items()))
    return f"0/{nodes} nodes are available: {reasons}."


def tolerates(tolerations: Iterable[Toleration], taint: Taint) -> bool:
    for toleration in tolerations:
        if toleration.effect and toleration.effect != taint.effect:
            continue
        if toleration.key and toleration.key != taint.key:
            continue
        if toleration.operator == "Exists" or (toleration.key and toleration.value == taint.value):
            return True
    return False


def host_ports(pod: Pod) -> set[HostPort]:
    """What the pod claims of its node: hostPorts, and with hostNetwork every containerPort."""
    claimed: set[HostPort] = set()
    for container in pod.spec.containers:
        for port in container.ports:
            number = port.host_port or (port.container_port if pod.spec.host_network else 0)
            if number:
                address = "" if port.host_ip in ("0.0.0.0", "::") else port.host_ip
                claimed.add((address, port.protocol, number))
    return claimed


def _ports_clash(one: HostPort, other: HostPort) -> bool:
    return one[1:] == other[1:] and (not one[0] or not other[0] or one[0] == other[0])


def group_of(pod: Pod) -> str:
    """What a pod is spread with: its controller's other pods, else the pods with the same labels in its namespace."""
    owner = pod.metadata.controller
    if owner is not None:
        return owner.uid
    return f"{pod.metadata.namespace}\0" + ",".join(f"{k}={v}" for k, v in sorted(pod.metadata.labels.items()))


def _capacity(node: Node) -> int:
    text = node.status.allocatable.get("pods", "")
    return int(text) if text.isdecimal() else DEFAULT_POD_CAPACITY


def _hard(rule: TopologySpread) -> bool:
    return rule.when_unsatisfiable == "DoNotSchedule"


class _Spread:
    """One topologySpreadConstraint for one pod: how many matching pods each domain has."""

    def __init__(self, rule: TopologySpread, pod: WorkloadPod, loads: Mapping[str, NodeLoad]) -> None:
        self._rule = rule
        self._self = int(self._matches(pod, pod))
        self._counts: Counter[str] = Counter()
        for load in loads.values():
            domain = load.node.metadata.labels.get(rule.topology_key)
            if domain is None or _outside(pod, load.node):
                continue
            self._counts[domain] += sum(self._matches(pod, member) for member in load.members)

    def _matches(self, pod: Pod, other: Pod) -> bool:
        selector = self._rule.label_selector
        return (
            selector is not None
            and pod.metadata.namespace == other.metadata.namespace
            and selector.matches(other.metadata.labels)
        )

    def refusal(self, node: Node) -> str:
        domain = node.metadata.labels.get(self._rule.topology_key)
        if domain is None:
            return "node(s) didn't match pod topology spread constraints (missing required label)"
        if self._counts[domain] + self._self - min(self._counts.values()) > self._rule.max_skew:
            return "node(s) didn't match pod topology spread constraints"
        return ""


def _outside(pod: WorkloadPod, node: Node) -> bool:
    selector = pod.spec.node_selector.items()
    return any(node.metadata.labels.get(key) != value for key, value in selector) or not node_affinity_allows(pod, node)
