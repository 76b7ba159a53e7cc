"""OpenAPI v3: every reference resolves, and what kubectl looks for is there."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.openapi import GROUP_KIND, OpenApi

OPENAPI = OpenApi(REGISTRY)
PATHS = list(OPENAPI.index()["paths"])


def document(path: str) -> dict[str, Any]:
    body = OPENAPI.document(path)
    assert body is not None
    loaded: dict[str, Any] = json.loads(body)
    return loaded


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_index_names_every_served_group() -> None:
    assert {"api/v1", "apis/apps/v1", "apis/discovery.k8s.io/v1", "apis/coordination.k8s.io/v1"} <= set(PATHS)
    assert OPENAPI.document("apis/batch/v1") is None


@pytest.mark.parametrize("path", PATHS)
def test_every_reference_resolves(path: str) -> None:
    made = document(path)
    known = {f"#/components/schemas/{name}" for name in made["components"]["schemas"]}
    assert set(references(made)) <= known


@pytest.mark.parametrize("kind", list(REGISTRY), ids=lambda k: k.resource.api_version + "." + k.resource.kind)
def test_every_kind_has_its_schema_and_a_patch_that_takes_field_validation(kind: Any) -> None:
    resource = kind.resource
    made = document(f"apis/{resource.group}/{resource.version}" if resource.group else "api/v1")
    gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    schemas = [s for s in made["components"]["schemas"].values() if gvk in s.get(GROUP_KIND, [])]
    assert len(schemas) == 1
    assert {"apiVersion", "kind", "metadata"} <= set(schemas[0]["properties"])
    patches = [item["patch"] for item in made["paths"].values() if item.get("patch", {}).get(GROUP_KIND) == gvk]
    assert patches
    assert all({"fieldValidation", "dryRun", "force"} <= {p["name"] for p in patch["parameters"]} for patch in patches)


def test_merge_markers_are_where_kubectl_merges_by_them() -> None:
    schemas = document("api/v1")["components"]["schemas"]
    containers = schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"]
    assert containers["x-kubernetes-patch-merge-key"] == "name"
    assert containers["x-kubernetes-patch-strategy"] == "merge"
    assert containers["x-kubernetes-list-map-keys"] == ["name"]
    assert schemas["io.k8s.api.core.v1.PodSpec"]["required"] == ["containers"]
    assert schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["volumes"]["x-kubernetes-patch-strategy"] == "merge,retainKeys"
    assert schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["tolerations"]["x-kubernetes-list-type"] == "atomic"
    assert schemas["io.k8s.api.core.v1.ServicePort"]["properties"]["targetPort"] == {
        "description": "Number or name of the port to access on the pods. Default: the value of port.",
        "type": "string",
        "format": "int-or-string",
    }
