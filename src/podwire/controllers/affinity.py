"""nodeAffinity, podAffinity and podAntiAffinity of one pod that is looking for a node. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence

from podwire.controllers.documents import NodeSelectorTerm, PodAffinityTerm, WorkloadPod
from podwire.model.meta import Requirement
from podwire.model.objects import Node, Pod

Population = Sequence[tuple[Node, Sequence[WorkloadPod]]]
"""All nodes with the pods on them."""

Domain = tuple[str, str]
"""A topology domain: a node label and its value."""


def node_affinity_allows(pod: WorkloadPod, node: Node) -> bool:
    """Whether one of the required terms matches; true where none is required."""
    required = pod.spec.affinity.node_affinity.required
    return required is None or any(_term_matches(term, node) for term in required.node_selector_terms)


def _term_matches(term: NodeSelectorTerm, node: Node) -> bool:
    if not term.match_expressions and not term.match_fields:
        return False
    fields = {"metadata.name": node.metadata.name}
    return all(_holds(r, node.metadata.labels) for r in term.match_expressions) and all(
        _holds(r, fields) for r in term.match_fields
    )


def _holds(requirement: Requirement, labels: dict[str, str]) -> bool:
    """A NodeSelectorRequirement: a label selector's, and Gt and Lt on whole numbers."""
    if requirement.operator not in ("Gt", "Lt"):
        return requirement.matches(labels)
    try:
        value, bound = int(labels[requirement.key]), int(requirement.values[0])
    except (KeyError, IndexError, ValueError):
        return False
    return value > bound if requirement.operator == "Gt" else value < bound


class PodAffinities:
    """What the pods that run already mean for `pod`: domains it must have, must not have, and likes more or less."""

    def __init__(self, pod: WorkloadPod, population: Population) -> None:
        affinity = pod.spec.affinity
        self._pod = pod
        self._wanted = [(term, _domains(term, pod, population)) for term in affinity.pod_affinity.required]
        self._forbidden: set[Domain] = set()
        for term in affinity.pod_anti_affinity.required:
            self._forbidden |= _domains(term, pod, population)
        self._forbidden.update(_refused_by_others(pod, population))
        self._liking: Counter[Domain] = Counter()
        for sign, kind in ((1, affinity.pod_affinity), (-1, affinity.pod_anti_affinity)):
            for preferred in kind.preferred:
                for domain in _domains(preferred.pod_affinity_term, pod, population):
                    self._liking[domain] += sign * preferred.weight

    def refusal(self, node: Node) -> str:
        """Why the node is out of the question, in kube-scheduler's words; empty if it is not."""
        labels = node.metadata.labels
        if any(labels.get(key) == value for key, value in self._forbidden):
            return "node(s) didn't match pod anti-affinity rules"
        for term, domains in self._wanted:
            value = labels.get(term.topology_key)
            first_of_its_kind = not domains and _selects(term, self._pod, self._pod)
            if value is None or (not first_of_its_kind and (term.topology_key, value) not in domains):
                return "node(s) didn't match pod affinity rules"
        return ""

    def score(self, node: Node) -> int:
        """The weights of all preferences that the node meets."""
        labels = node.metadata.labels
        score = sum(weight for (key, value), weight in self._liking.items() if labels.get(key) == value)
        for preferred in self._pod.spec.affinity.node_affinity.preferred:
            if _term_matches(preferred.preference, node):
                score += preferred.weight
        return score


def _selects(term: PodAffinityTerm, owner: Pod, other: Pod) -> bool:
    """Whether `term` of the pod `owner` means the pod `other`."""
    namespaces = term.namespaces or (owner.metadata.namespace,)
    selector = term.label_selector
    return selector is not None and other.metadata.namespace in namespaces and selector.matches(other.metadata.labels)


def _domains(term: PodAffinityTerm, owner: Pod, population: Population) -> set[Domain]:
    """The domains in which there is a pod that `term` means."""
    found: set[Domain] = set()
    for node, pods in population:
        value = node.metadata.labels.get(term.topology_key)
        domain = (term.topology_key, value or "")
        if value is not None and domain not in found and any(_selects(term, owner, other) for other in pods):
            found.add(domain)
    return found


def _refused_by_others(pod: Pod, population: Population) -> Iterable[Domain]:
    """Anti-affinity holds both ways: the domains of pods that do not want this one."""
    for node, others in population:
        for other in others:
            for term in other.spec.affinity.pod_anti_affinity.required:
                value = node.metadata.labels.get(term.topology_key)
                if value is not None and _selects(term, other, pod):
                    yield term.topology_key, value
