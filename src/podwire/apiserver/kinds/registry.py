"""The one list of served kinds."""

from collections.abc import Iterator

from podwire.apiserver.kinds.base import Kind
from podwire.apiserver.kinds.cluster import LeaseKind, NamespaceKind, NodeKind
from podwire.apiserver.kinds.configs import ConfigMapKind, SecretKind, ServiceAccountKind
from podwire.apiserver.kinds.events import EventKind, EventV1Kind
from podwire.apiserver.kinds.networking import IPAddressKind, ServiceCIDRKind
from podwire.apiserver.kinds.pods import PodKind
from podwire.apiserver.kinds.services import ServiceKind
from podwire.apiserver.kinds.slices import EndpointSliceKind
from podwire.apiserver.kinds.workloads import DeploymentKind, ReplicaSetKind


class Registry:
    """Kinds by path and by apiVersion + kind. Immutable."""

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self._kinds = kinds
        self._by_path = {(k.resource.group, k.resource.version, k.resource.plural): k for k in kinds}
        self._by_kind = {(k.resource.api_version, k.resource.kind): k for k in kinds}

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._kinds)

    def by_path(self, group: str, version: str, plural: str) -> Kind | None:
        """The kind served at /apis/<group>/<version>/…/<plural>; group "" is /api/v1."""
        return self._by_path.get((group, version, plural))

    def by_kind(self, api_version: str, kind: str) -> Kind | None:
        return self._by_kind.get((api_version, kind))

    def groups(self) -> dict[str, list[str]]:
        """Group → its versions, preferred first; core is ""."""
        found: dict[str, list[str]] = {}
        for kind in self._kinds:
            versions = found.setdefault(kind.resource.group, [])
            if kind.resource.version not in versions:
                versions.append(kind.resource.version)
        return found

    def of_group(self, group: str, version: str) -> list[Kind]:
        return [k for k in self._kinds if (k.resource.group, k.resource.version) == (group, version)]


REGISTRY = Registry(
    (
        ConfigMapKind(),
        EventKind(),
        NamespaceKind(),
        NodeKind(),
        PodKind(),
        SecretKind(),
        ServiceKind(),
        ServiceAccountKind(),
        DeploymentKind(),
        ReplicaSetKind(),
        LeaseKind(),
        EndpointSliceKind(),
        EventV1Kind(),
        IPAddressKind(),
        ServiceCIDRKind(),
    )
)
