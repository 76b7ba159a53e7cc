"""get and list: selectors, pages, resourceVersion semantics, tables and partial metadata."""

from typing import Any

import pytest
from apirig import Api, Serve

CMS = "/api/v1/namespaces/default/configmaps"
ALL = "/api/v1/configmaps"
TABLE = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"}
PARTIAL_LIST = {"Accept": "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"}
PARTIAL = {"Accept": "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"}


def names(document: Any) -> list[str]:
    return [item["metadata"]["name"] for item in document["items"]]


@pytest.fixture
async def filled(api: Api) -> Api:
    await api.configmap("a", app="web", tier="front")
    await api.configmap("b", app="web", tier="back")
    await api.configmap("c", app="db")
    await api.configmap("d", "kube-system")
    return api


async def test_a_list_has_a_kind_a_version_and_its_items_in_order(filled: Api) -> None:
    document = await filled.ok("GET", ALL)
    assert (document["kind"], document["apiVersion"]) == ("ConfigMapList", "v1")
    assert document["metadata"]["resourceVersion"] == str(await filled.store.revision())
    assert names(document) == ["a", "b", "c", "d"]
    assert names(await filled.ok("GET", CMS)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("app=web", ["a", "b"]),
        ("app==web,tier!=back", ["a"]),
        ("app!=web", ["c", "d"]),
        ("app in (db, web)", ["a", "b", "c"]),
        ("app notin (db)", ["a", "b", "d"]),
        ("tier", ["a", "b"]),
        ("!tier", ["c", "d"]),
        ("", ["a", "b", "c", "d"]),
    ],
)
async def test_label_selectors(filled: Api, selector: str, expected: list[str]) -> None:
    for limit in ("", "&limit=2"):
        found: list[str] = []
        token = ""
        while True:
            page = await filled.ok("GET", f"{ALL}?labelSelector={selector.replace('=', '%3D')}{limit}{token}")
            found += names(page)
            if "continue" not in page["metadata"]:
                break
            token = "&continue=" + page["metadata"]["continue"]
        assert found == expected


async def test_field_selectors(filled: Api) -> None:
    assert names(await filled.ok("GET", ALL + "?fieldSelector=metadata.name%3Db")) == ["b"]
    assert names(await filled.ok("GET", ALL + "?fieldSelector=metadata.namespace!%3Ddefault,metadata.name!%3Dx"))[-1] == "d"
    status = await filled.fails(400, "GET", ALL + "?fieldSelector=spec.foo%3Db")
    assert "field label not supported: spec.foo" in status["message"]


@pytest.mark.parametrize(
    "query", ["labelSelector=a+in+(b", "labelSelector=%3Dx", "resourceVersion=x", "limit=many", "continue=%%%"]
)
async def test_what_cannot_be_read_is_a_400(api: Api, query: str) -> None:
    await api.fails(400, "GET", f"{ALL}?{query}")


@pytest.mark.parametrize("query", ["resourceVersionMatch=Perhaps", "resourceVersionMatch=Exact", "sendInitialEvents=true"])
async def test_options_that_do_not_go_together_are_a_422(api: Api, query: str) -> None:
    assert (await api.fails(422, "GET", f"{ALL}?{query}"))["reason"] == "Invalid"


async def test_pages_show_one_revision(filled: Api) -> None:
    first = await filled.ok("GET", ALL + "?limit=2")
    assert first["metadata"]["remainingItemCount"] == 2
    await filled.configmap("bb")
    await filled.ok("DELETE", CMS + "/c")
    second = await filled.ok("GET", f"{ALL}?limit=2&continue={first['metadata']['continue']}")
    assert names(first) + names(second) == ["a", "b", "c", "d"]
    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
    assert "continue" not in second["metadata"]


async def test_a_page_that_is_too_old_is_a_410(filled: Api) -> None:
    first = await filled.ok("GET", ALL + "?limit=2")
    await filled.configmap("e")
    await filled.store.compact(await filled.store.revision())
    status = await filled.fails(410, "GET", f"{ALL}?limit=2&continue={first['metadata']['continue']}")
    assert status["reason"] == "Expired"


async def test_an_exact_revision(filled: Api) -> None:
    version = (await filled.ok("GET", ALL))["metadata"]["resourceVersion"]
    await filled.configmap("e")
    old = await filled.ok("GET", f"{ALL}?resourceVersion={version}&resourceVersionMatch=Exact")
    assert names(old) == ["a", "b", "c", "d"]
    newer = await filled.ok("GET", f"{ALL}?resourceVersion={version}&resourceVersionMatch=NotOlderThan")
    assert "e" in names(newer)
    assert names(await filled.ok("GET", ALL + "?resourceVersion=0"))[-1] in ("d", "e")


async def test_a_revision_from_the_future_is_a_504(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("podwire.apiserver.watch.FUTURE_SECONDS", 0.05)
    status = await api.fails(504, "GET", ALL + "?resourceVersion=999999")
    assert status["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"


async def test_one_reads_what_one_wrote(api: Api) -> None:
    for n in range(30):
        await api.configmap(f"x{n}")
        assert len((await api.ok("GET", CMS))["items"]) == n + 1


async def test_tables(filled: Api) -> None:
    table = await filled.ok("GET", CMS, **TABLE)
    assert (table["kind"], table["apiVersion"]) == ("Table", "meta.k8s.io/v1")
    assert [c["name"] for c in table["columnDefinitions"]] == ["Name", "Data", "Age"]
    assert [row["cells"][:2] for row in table["rows"]] == [["a", 0], ["b", 0], ["c", 0]]
    assert table["rows"][0]["object"]["kind"] == "PartialObjectMetadata"
    assert table["metadata"]["resourceVersion"]
    one = await filled.ok("GET", CMS + "/a", **TABLE)
    assert [row["cells"][0] for row in one["rows"]] == ["a"]
    whole = await filled.ok("GET", CMS + "?includeObject=Object&limit=1", **TABLE)
    assert whole["rows"][0]["object"]["kind"] == "ConfigMap"
    assert whole["metadata"]["continue"]


async def test_partial_metadata(filled: Api) -> None:
    listed = await filled.ok("GET", CMS, **PARTIAL_LIST)
    assert listed["kind"] == "PartialObjectMetadataList"
    assert {item["kind"] for item in listed["items"]} == {"PartialObjectMetadata"}
    one = await filled.ok("GET", CMS + "/a", **PARTIAL)
    assert (one["kind"], one["metadata"]["labels"]["app"]) == ("PartialObjectMetadata", "web")


async def test_yaml_answers(filled: Api) -> None:
    answer = await filled("GET", CMS + "/a", Accept="application/yaml")
    assert answer.body.startswith(b"apiVersion: v1\n")


async def test_protobuf_alone_is_a_406(api: Api) -> None:
    only = {"Accept": "application/vnd.kubernetes.protobuf"}
    assert (await api.fails(406, "GET", CMS, **only))["reason"] == "NotAcceptable"
    both = {"Accept": "application/vnd.kubernetes.protobuf,application/json"}
    assert (await api.ok("GET", CMS, **both))["kind"] == "ConfigMapList"


async def test_discovery_in_both_shapes(api: Api) -> None:
    assert (await api.ok("GET", "/api"))["versions"] == ["v1"]
    groups = {group["name"] for group in (await api.ok("GET", "/apis"))["groups"]}
    assert {"apps", "discovery.k8s.io", "coordination.k8s.io", "events.k8s.io", "authorization.k8s.io"} <= groups
    apps = await api.ok("GET", "/apis/apps/v1")
    assert {"deployments", "deployments/status", "deployments/scale", "replicasets"} <= {r["name"] for r in apps["resources"]}
    assert (await api.ok("GET", "/apis/apps"))["preferredVersion"] == {"groupVersion": "apps/v1", "version": "v1"}
    accept = {"Accept": "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"}
    answer = await api("GET", "/apis", **accept)
    assert "as=APIGroupDiscoveryList" in answer.headers["Content-Type"]
    found = {item["metadata"]["name"]: item for item in answer.doc["items"]}
    deployments = next(r for r in found["apps"]["versions"][0]["resources"] if r["resource"] == "deployments")
    assert (deployments["scope"], deployments["responseKind"]["kind"]) == ("Namespaced", "Deployment")
    assert {sub["subresource"] for sub in deployments["subresources"]} == {"status", "scale"}
    core = await api.ok("GET", "/api", **accept)
    assert {r["resource"] for r in core["items"][0]["versions"][0]["resources"]} >= {"pods", "services", "nodes"}


async def test_health_version_and_openapi(api: Api) -> None:
    for path in ("/healthz", "/readyz", "/livez", "/readyz/ping"):
        assert (await api("GET", path)).body == b"ok"
    assert (await api.ok("GET", "/version"))["gitVersion"].startswith("v1.")
    index = await api.ok("GET", "/openapi/v3")
    url = index["paths"]["api/v1"]["serverRelativeURL"]
    assert "io.k8s.api.core.v1.Pod" in (await api.ok("GET", url))["components"]["schemas"]
    await api.fails(404, "GET", "/openapi/v3/apis/nope/v1")
    assert (await api.ok("GET", "/openapi/v2"))["swagger"] == "2.0"


async def test_reviews(api: Api, serve: Serve) -> None:
    url = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    review = await api.ok("POST", url, {"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}})
    assert review["status"]["allowed"] is True
    rules = await api.ok("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", {"spec": {"namespace": "default"}})
    assert rules["status"]["resourceRules"]
    who = await api.ok("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", {})
    assert who["status"]["userInfo"]["username"] == "kubernetes-admin"
    token = await api.ok("POST", "/apis/authentication.k8s.io/v1/tokenreviews", {"spec": {"token": "x"}})
    assert token["status"] == {"authenticated": False}
    await api.fails(404, "POST", "/apis/authorization.k8s.io/v1/nonsense", {})
