"""What a node may do: see what its agent needs, write its own objects. As Kubernetes' node authorizer and NodeRestriction
plugin have it, except that a node may also delete its own Node (`podwire leave`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from podwire.apiserver import status
from podwire.apiserver.auth import BOOTSTRAPPERS, MASTERS, NODES, User
from podwire.apiserver.hub import Entry, Hub
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.request import Target
from podwire.apiserver.selectors import parse_fields
from podwire.apiserver.storage import key_of
from podwire.model import acknowledgement, resources
from podwire.model.meta import Json

NODE_PREFIX = "system:node:"
LEASE_NAMESPACE = "kube-node-lease"
MIRROR = "kubernetes.io/config.mirror"
"""On a Pod: it shows what a node runs by itself. A node may create only such Pods."""

READABLE = frozenset({"services", "endpointslices", "nodes", "namespaces", "servicecidrs"})
REFERENCED = {"configmaps": (b'"configMap"', b'"configMapRef"', b'"configMapKeyRef"'), "secrets": (b'"secret',)}

_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def node_of(user: User) -> str:
    """The node that this user is; empty for others."""
    return user.name.removeprefix(NODE_PREFIX) if NODES in user.groups and user.name.startswith(NODE_PREFIX) else ""


class NodeRules:
    """`check` every request of a restricted user; all others may do everything."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    @staticmethod
    def restricted(user: User) -> bool:
        return MASTERS not in user.groups and (NODES in user.groups or BOOTSTRAPPERS in user.groups)

    def check(self, user: User, target: Target, method: str, query: Mapping[str, str], body: Json | None) -> None:
        """`body` is the document of a POST. Raises StatusError 403."""
        node, verb = node_of(user), _VERBS.get(method, method)
        problem = self._problem(node, target, verb, query, body or {}) if node else "this user may only join the cluster"
        if problem:
            at = f' in the namespace "{target.namespace}"' if target.namespace else ""
            why = f'User "{user.name}" cannot {verb} resource "{target.kind.resource.plural}"{at}: {problem}'
            raise status.forbidden(target.kind.resource, target.name, why)

    def _problem(self, node: str, target: Target, verb: str, query: Mapping[str, str], body: Json) -> str:
        """Why not; empty where it may."""
        plural = target.kind.storage.plural
        if verb == "get" and plural in READABLE:
            return ""
        match plural:
            case "nodes":
                name = target.name or str(body.get("metadata", {}).get("name", ""))
                return "" if name == node else "a node may change only its own Node"
            case "leases":
                name = target.name or str(body.get("metadata", {}).get("name", ""))
                own = (LEASE_NAMESPACE, node), (acknowledgement.NAMESPACE, acknowledgement.lease_name(node))
                return "" if (target.namespace, name) in own else "a node may use only its own Lease"
            case "pods":
                return self._pod_problem(node, target, verb, query, body)
            case "events":
                return "" if verb in ("create", "patch") else "a node may only record events"
            case "configmaps" | "secrets":
                known = verb == "get" and target.name and self._refers(node, plural, target.namespace, target.name)
                return "" if known else "no pod of this node refers to it"
            case _:
                return "a node has no business with it"

    def _pod_problem(self, node: str, target: Target, verb: str, query: Mapping[str, str], body: Json) -> str:
        if verb == "create" and not target.name:
            meta, spec = body.get("metadata") or {}, body.get("spec") or {}
            mirror = MIRROR in (meta.get("annotations") or {})
            return "" if mirror and spec.get("nodeName") == node else "a node may create only mirror pods of its own"
        if verb == "get" and not target.name:
            terms = parse_fields(query.get("fieldSelector", ""), target.kind.selectable_fields({"metadata": {}})).terms
            own = any(t.key == "spec.nodeName" and t.operator == "in" and set(t.values) == {node} for t in terms)
            return "" if own else "a node may list only its own pods (fieldSelector spec.nodeName)"
        if not target.name:
            return "a node may not touch pods in bulk"
        entry = self._hub.shelf(target.kind).get(key_of(resources.PODS, target.namespace, target.name))
        if entry is not None and entry.fields.get("spec.nodeName") != node:
            return "the pod is not on this node"
        allowed = verb in ("get", "delete") or (verb in ("patch", "update") and target.subresource == "status")
        # Of a pod that is not there nobody learns more than that; a mirror pod's labels are the node's to set.
        mirror = entry is not None and MIRROR.encode() in entry.raw and verb in ("patch", "update") and not target.subresource
        return "" if allowed or mirror else "a node may only report its pods' status and delete them"

    def _refers(self, node: str, plural: str, namespace: str, name: str) -> bool:
        """Whether a pod of the node names the object in its volumes or its containers' environment."""
        for pod in self._pods(node, namespace):
            if any(mark in pod.raw for mark in REFERENCED[plural]):
                spec = pod.document(_pod_kind()).get("spec") or {}
                if name in set(referenced(spec, plural)):
                    return True
        return False

    def _pods(self, node: str, namespace: str) -> Iterator[Entry]:
        for entry in self._hub.shelf(_pod_kind()).all():
            if entry.namespace == namespace and entry.fields.get("spec.nodeName") == node:
                yield entry


def referenced(spec: Json, plural: str) -> Iterator[str]:
    """The names of the ConfigMaps or Secrets that a pod's specification refers to."""
    for volume in spec.get("volumes") or ():
        for source in (volume, *((volume.get("projected") or {}).get("sources") or ())):
            if plural == "configmaps":
                yield _name(source.get("configMap"))
            else:
                secret = source.get("secret") or {}
                yield str(secret.get("secretName") or secret.get("name") or "")
    ref, key_ref = ("configMapRef", "configMapKeyRef") if plural == "configmaps" else ("secretRef", "secretKeyRef")
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        for source in container.get("envFrom") or ():
            yield _name(source.get(ref))
        for variable in container.get("env") or ():
            yield _name((variable.get("valueFrom") or {}).get(key_ref))
    if plural == "secrets":
        yield from (_name(item) for item in spec.get("imagePullSecrets") or ())


def _name(reference: Any) -> str:
    return str((reference or {}).get("name") or "")


def _pod_kind() -> Any:
    kind = REGISTRY.by_kind(resources.PODS.api_version, resources.PODS.kind)
    assert kind is not None
    return kind
