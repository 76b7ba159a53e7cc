"""/api and /apis in both shapes (legacy lists, and the aggregated one that current clients ask for), and /version."""

import platform
import sys
from collections.abc import Sequence

from podwire.apiserver.kinds import REGISTRY, Kind
from podwire.model.meta import Json

AGGREGATED = "apidiscovery.k8s.io"

VERSION = "v1.36.0"
"""The Kubernetes version whose API this is."""


def wants_aggregated(accept: str) -> bool:
    """Whether the client reads APIGroupDiscoveryList v2."""
    return any(f"g={AGGREGATED}" in part and "v=v2" in part and "v=v2beta1" not in part for part in accept.split(","))


def version(build: str) -> Json:
    """/version."""
    major, minor, _ = VERSION.removeprefix("v").split(".")
    return {
        "major": major,
        "minor": minor,
        "gitVersion": f"{VERSION}+podwire.{build}",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "python" + ".".join(map(str, sys.version_info[:3])),
        "platform": f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine()) }",
    }


def api_versions(addresses: Sequence[str]) -> Json:
    """/api."""
    hosts = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address} for address in addresses]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": hosts}


def group_list() -> Json:
    """/apis."""
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g, v) for g, v in _groups()]}


def group(name: str) -> Json | None:
    """/apis/<group>."""
    found = next((_group(g, v) for g, v in _groups() if g == name), None)
    return None if found is None else {"kind": "APIGroup", "apiVersion": "v1", **found}


def resource_list(name: str, version_: str) -> Json | None:
    """/api/v1 and /apis/<group>/<version>: None where that version is not served."""
    kinds = REGISTRY.of_group(name, version_)
    if not kinds and (name, version_) not in VIRTUAL:
        return None
    resources = [resource for kind in kinds for resource in _resources(kind)] + VIRTUAL.get((name, version_), [])
    group_version = f"{name}/{version_}" if name else version_
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}


def aggregated(core: bool) -> Json:
    """/api or /apis as APIGroupDiscoveryList."""
    groups = [("", ["v1"])] if core else _groups()
    items = [
        {
            "metadata": {"name": name, "creationTimestamp": None} if name else {"creationTimestamp": None},
            "versions": [_aggregated_version(name, v) for v in versions],
        }
        for name, versions in groups
    ]
    return {"kind": "APIGroupDiscoveryList", "apiVersion": f"{AGGREGATED}/v2", "metadata": {}, "items": items}


def _virtual(name: str, kind: str, singular: str = "") -> Json:
    return {"name": name, "singularName": singular, "namespaced": False, "kind": kind, "verbs": ["create"]}


VIRTUAL: dict[tuple[str, str], list[Json]] = {
    ("authorization.k8s.io", "v1"): [
        _virtual("selfsubjectaccessreviews", "SelfSubjectAccessReview", "selfsubjectaccessreview"),
        _virtual("selfsubjectrulesreviews", "SelfSubjectRulesReview", "selfsubjectrulesreview"),
        _virtual("subjectaccessreviews", "SubjectAccessReview", "subjectaccessreview"),
    ],
    ("authentication.k8s.io", "v1"): [
        _virtual("tokenreviews", "TokenReview", "tokenreview"),
        _virtual("selfsubjectreviews", "SelfSubjectReview", "selfsubjectreview"),
    ],
}
"""Resources that are only asked and never stored, by (group, version)."""


def _groups() -> list[tuple[str, list[str]]]:
    found = [(name, versions) for name, versions in REGISTRY.groups().items() if name]
    return found + [(name, [version_]) for name, version_ in VIRTUAL]


def _group(name: str, versions: Sequence[str]) -> Json:
    listed = [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _resources(kind: Kind) -> list[Json]:
    own: Json = {
        "name": kind.resource.plural,
        "singularName": kind.singular,
        "namespaced": kind.resource.namespaced,
        "kind": kind.resource.kind,
        "verbs": list(kind.verbs),
    }
    if kind.short_names:
        own["shortNames"] = list(kind.short_names)
    if kind.categories:
        own["categories"] = list(kind.categories)
    subs = []
    for sub in kind.subresources:
        group_name, _, version_ = sub.api_version.rpartition("/")
        entry: Json = {
            "name": f"{kind.resource.plural}/{sub.name}",
            "singularName": "",
            "namespaced": kind.resource.namespaced,
            "kind": sub.kind or kind.resource.kind,
            "verbs": list(sub.verbs),
        }
        if sub.api_version and sub.api_version != kind.resource.api_version:
            entry |= {"group": group_name, "version": version_}
        subs.append(entry)
    return [own, *subs]


def _aggregated_version(name: str, version_: str) -> Json:
    resources = [_aggregated_resource(kind) for kind in REGISTRY.of_group(name, version_)]
    resources += [_aggregated_virtual(name, version_, entry) for entry in VIRTUAL.get((name, version_), [])]
    return {"version": version_, "freshness": "Current", "resources": resources}


def _aggregated_resource(kind: Kind) -> Json:
    resource = kind.resource
    entry: Json = {
        "resource": resource.plural,
        "responseKind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": kind.singular,
        "verbs": list(kind.verbs),
    }
    if kind.short_names:
        entry["shortNames"] = list(kind.short_names)
    if kind.categories:
        entry["categories"] = list(kind.categories)
    if kind.subresources:
        entry["subresources"] = [_aggregated_sub(kind, sub.name) for sub in kind.subresources]
    return entry


def _aggregated_sub(kind: Kind, name: str) -> Json:
    sub = next(s for s in kind.subresources if s.name == name)
    api_version = sub.api_version or kind.resource.api_version
    group_name, _, version_ = api_version.rpartition("/")
    response = {"group": group_name, "version": version_, "kind": sub.kind or kind.resource.kind}
    return {"subresource": sub.name, "responseKind": response, "verbs": list(sub.verbs)}


def _aggregated_virtual(name: str, version_: str, entry: Json) -> Json:
    return {
        "resource": entry["name"],
        "responseKind": {"group": name, "version": version_, "kind": entry["kind"]},
        "scope": "Cluster",
        "singularResource": entry["singularName"],
        "verbs": entry["verbs"],
    }
