"""How lists and maps of the API merge: Kubernetes' patchMergeKey/patchStrategy and listType/mapType markers.

A list without an entry is one value and replaced whole; a map or message without an entry merges field by field.
"""

from typing import NamedTuple


class ListRule(NamedTuple):
    """`key`: by which strategic merge patch matches items ("" for plain values). `keys`: the same for server-side apply.

    Plain values (key "" and no keys) form a set. `retain`: $retainKeys applies to the items (patchStrategy retainKeys).
    `strategic` and `apply` say whether the rule holds for that kind of patch at all.
    """

    key: str = ""
    keys: tuple[str, ...] = ()
    retain: bool = False
    strategic: bool = True
    apply: bool = True


def _by(key: str, *more: str, retain: bool = False) -> ListRule:
    return ListRule(key, (key, *more), retain)


_SET = ListRule()

LIST_RULES: dict[tuple[str, str], ListRule] = {
    ("ObjectMeta", "finalizers"): _SET,
    ("ObjectMeta", "ownerReferences"): _by("uid"),
    ("PodSpec", "volumes"): _by("name", retain=True),
    ("PodSpec", "containers"): _by("name"),
    ("PodSpec", "initContainers"): _by("name"),
    ("PodSpec", "ephemeralContainers"): _by("name"),
    ("PodSpec", "imagePullSecrets"): _by("name"),
    ("PodSpec", "hostAliases"): _by("ip"),
    ("PodSpec", "topologySpreadConstraints"): _by("topologyKey", "whenUnsatisfiable"),
    ("PodSpec", "schedulingGates"): _by("name"),
    ("PodSpec", "resourceClaims"): _by("name", retain=True),
    ("Container", "ports"): _by("containerPort", "protocol"),
    ("Container", "env"): _by("name"),
    ("Container", "volumeMounts"): _by("mountPath"),
    ("Container", "volumeDevices"): _by("devicePath"),
    ("EphemeralContainerCommon", "ports"): _by("containerPort", "protocol"),
    ("EphemeralContainerCommon", "env"): _by("name"),
    ("EphemeralContainerCommon", "volumeMounts"): _by("mountPath"),
    ("PodStatus", "conditions"): _by("type"),
    ("PodStatus", "podIPs"): _by("ip"),
    ("PodStatus", "hostIPs"): ListRule("ip", apply=False),
    ("ResourceRequirements", "claims"): ListRule(keys=("name",), strategic=False),
    ("ServiceSpec", "ports"): _by("port", "protocol"),
    ("ServiceStatus", "conditions"): _by("type"),
    ("ServiceAccount", "secrets"): _by("name"),
    ("NodeSpec", "podCIDRs"): _SET,
    ("NodeStatus", "conditions"): _by("type"),
    ("NodeStatus", "addresses"): _by("type"),
    ("NamespaceStatus", "conditions"): _by("type"),
    ("DeploymentStatus", "conditions"): _by("type"),
    ("ReplicaSetStatus", "conditions"): _by("type"),
}
"""(message's short name, field) → rule."""

RETAIN_KEYS: frozenset[tuple[str, str]] = frozenset({("DeploymentSpec", "strategy")})
"""Messages in which one member excludes the others (patchStrategy retainKeys on a field that is no list)."""

ATOMIC_MESSAGES: frozenset[str] = frozenset(
    {
        "ConfigMapKeySelector",
        "FileKeySelector",
        "LabelSelector",
        "LocalObjectReference",
        "NodeSelector",
        "NodeSelectorTerm",
        "ObjectFieldSelector",
        "ObjectReference",
        "OwnerReference",
        "ResourceFieldSelector",
        "SecretKeySelector",
        "TypedLocalObjectReference",
    }
)
"""Messages that server-side apply owns as a whole (structType=atomic)."""

ATOMIC_MAPS: frozenset[tuple[str, str]] = frozenset({("ServiceSpec", "selector"), ("PodSpec", "nodeSelector")})
"""Maps that server-side apply owns as a whole (mapType=atomic)."""


def short(message: str) -> str:
    """A message's name without its package."""
    return message.rsplit(".", 1)[-1]


def strategic_rule(message: str, field: str) -> ListRule | None:
    rule = LIST_RULES.get((short(message), field))
    return rule if rule is not None and rule.strategic else None


def apply_rule(message: str, field: str) -> ListRule | None:
    rule = LIST_RULES.get((short(message), field))
    return rule if rule is not None and rule.apply else None
