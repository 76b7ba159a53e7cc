"""Create, read, update, patch and delete, and how they refuse."""

import asyncio
from typing import Any

import pytest
from apirig import Api

CMS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
MERGE = {"Content_Type": "application/merge-patch+json"}


class TestCreate:
    async def test_the_server_fills_in_the_metadata(self, api: Api) -> None:
        made = await api.ok("POST", CMS, {"metadata": {"name": "a"}, "data": {"k": "v"}})
        meta = made["metadata"]
        assert (made["apiVersion"], made["kind"], meta["namespace"]) == ("v1", "ConfigMap", "default")
        assert len(meta["uid"]) == 36
        assert meta["creationTimestamp"].endswith("Z")
        assert int(meta["resourceVersion"]) > 1
        assert await api.ok("GET", CMS + "/a") == made

    async def test_it_answers_201(self, api: Api) -> None:
        assert (await api("POST", CMS, {"metadata": {"name": "a"}})).code == 201

    async def test_a_taken_name_is_a_409(self, api: Api) -> None:
        await api.configmap("a")
        status = await api.fails(409, "POST", CMS, {"metadata": {"name": "a"}})
        assert status["reason"] == "AlreadyExists"
        assert status["message"] == 'configmaps "a" already exists'
        assert status["details"] == {"name": "a", "kind": "configmaps"}

    async def test_generate_name_makes_different_names(self, api: Api) -> None:
        names = [(await api.ok("POST", CMS, {"metadata": {"generateName": "job-"}}))["metadata"]["name"] for _ in range(5)]
        assert len(set(names)) == 5
        assert all(name.startswith("job-") and len(name) == 9 for name in names)

    async def test_dry_run_stores_nothing(self, api: Api) -> None:
        made = await api.ok("POST", CMS + "?dryRun=All", {"metadata": {"name": "a"}})
        assert made["metadata"]["uid"]
        await api.fails(404, "GET", CMS + "/a")
        await api.configmap("b")
        await api.fails(409, "POST", CMS + "?dryRun=All", {"metadata": {"name": "b"}})

    async def test_a_missing_namespace_is_a_404(self, api: Api) -> None:
        status = await api.fails(404, "POST", "/api/v1/namespaces/nope/configmaps", {"metadata": {"name": "a"}})
        assert status["message"] == 'namespaces "nope" not found'

    async def test_what_does_not_fit_the_url_is_a_400(self, api: Api) -> None:
        other = {"metadata": {"name": "a", "namespace": "kube-system"}}
        assert "does not match the namespace" in (await api.fails(400, "POST", CMS, other))["message"]
        wrong_kind = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "a"}}
        assert "does not match the expected kind" in (await api.fails(400, "POST", CMS, wrong_kind))["message"]
        wrong_version = {"kind": "ConfigMap", "apiVersion": "v2", "metadata": {"name": "a"}}
        assert "does not match the expected API version" in (await api.fails(400, "POST", CMS, wrong_version))["message"]
        versioned = {"metadata": {"name": "a", "resourceVersion": "5"}}
        assert "should not be set" in (await api.fails(400, "POST", CMS, versioned))["message"]

    @pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe"])
    async def test_a_body_that_is_no_object_is_a_400(self, api: Api, body: bytes) -> None:
        assert (await api.fails(400, "POST", CMS, body))["reason"] == "BadRequest"

    async def test_yaml_is_read(self, api: Api) -> None:
        made = await api.ok("POST", CMS, b"metadata:\n  name: a\ndata: {k: v}\n", Content_Type="application/yaml")
        assert made["data"] == {"k": "v"}

    async def test_an_unknown_media_type_is_a_415(self, api: Api) -> None:
        status = await api.fails(415, "POST", CMS, b"<a/>", Content_Type="text/xml")
        assert status["reason"] == "UnsupportedMediaType"

    async def test_a_huge_body_is_a_413(self, api: Api) -> None:
        huge = {"metadata": {"name": "a"}, "data": {"k": "x" * (3 * 1024 * 1024)}}
        assert (await api.fails(413, "POST", CMS, huge))["reason"] == "RequestEntityTooLarge"

    async def test_invalid_fields_are_a_422_with_causes(self, api: Api) -> None:
        body = {"metadata": {"name": "Bad_Name"}, "spec": {"ports": [{"port": 70000}]}}
        status = await api.fails(422, "POST", "/api/v1/namespaces/default/services", body)
        assert status["reason"] == "Invalid"
        assert status["details"]["kind"] == "Service"
        fields = {cause["field"]: cause["reason"] for cause in status["details"]["causes"]}
        assert fields["spec.ports[0].port"] == "FieldValueInvalid"
        assert "metadata.name" in fields
        assert status["message"].startswith('Service "Bad_Name" is invalid: [')

    async def test_unknown_fields_follow_field_validation(self, api: Api) -> None:
        body = {"metadata": {"name": "a"}, "dta": {}}
        strict = await api.fails(400, "POST", CMS + "?fieldValidation=Strict", body)
        assert 'unknown field "dta"' in strict["message"]
        warned = await api("POST", CMS + "?fieldValidation=Warn", body)
        assert warned.code == 201
        assert warned.warnings == ['299 - "unknown field \\"dta\\""']
        assert "dta" not in warned.doc


class TestUpdate:
    async def test_a_put_replaces(self, api: Api) -> None:
        made = await api.ok("POST", CMS, {"metadata": {"name": "a"}, "data": {"k": "1", "l": "1"}})
        made["data"] = {"k": "2"}
        changed = await api.ok("PUT", CMS + "/a", made)
        assert changed["data"] == {"k": "2"}
        assert int(changed["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])

    async def test_a_stale_version_is_a_409(self, api: Api) -> None:
        made = await api.configmap("a")
        await api.ok("PUT", CMS + "/a", {**made, "data": {"k": "1"}})
        status = await api.fails(409, "PUT", CMS + "/a", {**made, "data": {"k": "2"}})
        assert status["reason"] == "Conflict"
        assert status["message"].startswith('Operation cannot be fulfilled on configmaps "a": the object has been modified')

    async def test_without_a_version_the_last_write_wins(self, api: Api) -> None:
        await api.configmap("a")
        await asyncio.gather(
            *(api.ok("PUT", CMS + "/a", {"metadata": {"name": "a"}, "data": {"n": str(n)}}) for n in range(10))
        )

    async def test_a_write_that_changes_nothing_makes_no_version(self, api: Api) -> None:
        made = await api.configmap("a")
        assert await api.ok("PUT", CMS + "/a", made) == made

    async def test_who_an_object_is_cannot_be_changed(self, api: Api) -> None:
        made = await api.configmap("a")
        moved = {**made, "metadata": {**made["metadata"], "creationTimestamp": "2001-01-01T00:00:00Z"}}
        kept = await api.ok("PUT", CMS + "/a", moved)
        assert kept["metadata"]["creationTimestamp"] == made["metadata"]["creationTimestamp"]
        another = {**made, "metadata": {**made["metadata"], "uid": "other"}}
        assert "Precondition failed: UID" in (await api.fails(409, "PUT", CMS + "/a", another))["message"]
        renamed = {**made, "metadata": {**made["metadata"], "name": "b"}}
        assert "does not match the name on the URL" in (await api.fails(400, "PUT", CMS + "/a", renamed))["message"]

    async def test_what_is_not_there_is_not_made(self, api: Api) -> None:
        await api.fails(404, "PUT", CMS + "/a", {"metadata": {"name": "a"}})

    async def test_spec_and_status_are_written_apart(self, api: Api) -> None:
        pod = await api.pod("p")
        both = {**pod, "metadata": {"name": "p", "labels": {"a": "b"}}, "status": {"phase": "Running"}}
        main = await api.ok("PUT", PODS + "/p", both)
        assert (main["metadata"]["labels"], main["status"]["phase"]) == ({"a": "b"}, "Pending")
        wrong = {**main, "spec": {"containers": []}, "status": {"phase": "Running"}}
        status = await api.ok("PUT", PODS + "/p/status", wrong)
        assert (status["spec"], status["status"]["phase"]) == (main["spec"], "Running")


class TestPatch:
    @pytest.mark.parametrize(
        ("media", "patch"),
        [
            ("application/merge-patch+json", {"data": {"k": "2", "l": None}}),
            ("application/strategic-merge-patch+json", {"data": {"k": "2", "l": None}}),
            (
                "application/json-patch+json",
                [{"op": "replace", "path": "/data/k", "value": "2"}, {"op": "remove", "path": "/data/l"}],
            ),
        ],
    )
    async def test_each_kind_of_patch(self, api: Api, media: str, patch: Any) -> None:
        await api.ok("POST", CMS, {"metadata": {"name": "a"}, "data": {"k": "1", "l": "1"}})
        changed = await api.ok("PATCH", CMS + "/a", patch, Content_Type=media)
        assert changed["data"] == {"k": "2"}

    async def test_patches_in_parallel_all_count(self, api: Api) -> None:
        await api.configmap("a")
        await asyncio.gather(*(api.ok("PATCH", CMS + "/a", {"data": {f"k{n}": "v"}}, **MERGE) for n in range(10)))
        assert len((await api.ok("GET", CMS + "/a"))["data"]) == 10

    async def test_a_version_in_a_patch_is_a_precondition(self, api: Api) -> None:
        await api.configmap("a")
        patch = {"metadata": {"resourceVersion": "1"}, "data": {"k": "v"}}
        await api.fails(409, "PATCH", CMS + "/a", patch, **MERGE)

    async def test_what_cannot_be_patched_is_refused(self, api: Api) -> None:
        await api.configmap("a")
        await api.fails(404, "PATCH", CMS + "/b", {}, **MERGE)
        await api.fails(400, "PATCH", CMS + "/a", b"{", **MERGE)
        status = await api.fails(415, "PATCH", CMS + "/a", {})
        assert "application/json-patch+json" in status["message"]
        missing = [{"op": "remove", "path": "/data/none"}]
        await api.fails(422, "PATCH", CMS + "/a", missing, Content_Type="application/json-patch+json")

    async def test_apply_makes_changes_and_conflicts(self, api: Api) -> None:
        headers = {"Content_Type": "application/apply-patch+yaml"}
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "1"}}
        made = await api("PATCH", CMS + "/a?fieldManager=one", config, **headers)
        assert made.code == 201
        again = await api("PATCH", CMS + "/a?fieldManager=one", config, **headers)
        assert (again.code, again.doc) == (200, made.doc)
        other = {**config, "data": {"k": "2"}}
        status = await api.fails(409, "PATCH", CMS + "/a?fieldManager=two", other, **headers)
        assert [cause["reason"] for cause in status["details"]["causes"]] == ["FieldManagerConflict"]
        forced = await api.ok("PATCH", CMS + "/a?fieldManager=two&force=true", other, **headers)
        assert forced["data"] == {"k": "2"}
        await api.fails(400, "PATCH", CMS + "/a", config, **headers)


class TestDelete:
    async def test_it_is_gone_and_the_answer_says_which(self, api: Api) -> None:
        made = await api.configmap("a")
        status = await api.ok("DELETE", CMS + "/a")
        assert status["status"] == "Success"
        assert status["details"] == {"name": "a", "kind": "configmaps", "uid": made["metadata"]["uid"]}
        await api.fails(404, "DELETE", CMS + "/a")

    async def test_preconditions(self, api: Api) -> None:
        made = await api.configmap("a")
        await api.fails(409, "DELETE", CMS + "/a", {"preconditions": {"uid": "other"}})
        await api.fails(409, "DELETE", CMS + "/a", {"preconditions": {"resourceVersion": "1"}})
        await api.ok("DELETE", CMS + "/a", {"preconditions": {"uid": made["metadata"]["uid"]}})

    async def test_dry_run_removes_nothing(self, api: Api) -> None:
        await api.configmap("a")
        await api.ok("DELETE", CMS + "/a", {"dryRun": ["All"]})
        await api.ok("GET", CMS + "/a")

    async def test_a_finalizer_keeps_it_until_it_is_taken_off(self, api: Api) -> None:
        await api.ok("POST", CMS, {"metadata": {"name": "a", "finalizers": ["example.org/keep"]}})
        marked = await api.ok("DELETE", CMS + "/a")
        assert marked["metadata"]["deletionTimestamp"]
        added = {"metadata": {"finalizers": ["example.org/keep", "example.org/more"]}}
        status = await api.fails(422, "PATCH", CMS + "/a", added, **MERGE)
        assert "no new finalizers can be added" in status["message"]
        await api.ok("PATCH", CMS + "/a", {"metadata": {"finalizers": None}}, **MERGE)
        await api.fails(404, "GET", CMS + "/a")

    @pytest.mark.parametrize(("policy", "finalizer"), [("Foreground", "foregroundDeletion"), ("Orphan", "orphan")])
    async def test_propagation_is_a_finalizer(self, api: Api, policy: str, finalizer: str) -> None:
        await api.configmap("a")
        marked = await api.ok("DELETE", CMS + "/a", {"propagationPolicy": policy})
        assert marked["metadata"]["finalizers"] == [finalizer]
        await api.ok("DELETE", CMS + "/a?propagationPolicy=Background")
        await api.fails(404, "GET", CMS + "/a")

    async def test_an_unknown_propagation_is_a_400(self, api: Api) -> None:
        await api.configmap("a")
        await api.fails(400, "DELETE", CMS + "/a?propagationPolicy=Sideways")

    async def test_a_pod_on_a_node_gets_its_grace(self, api: Api) -> None:
        await api.pod("p", nodeName="n1", terminationGracePeriodSeconds=20)
        marked = await api.ok("DELETE", PODS + "/p")
        assert marked["metadata"]["deletionGracePeriodSeconds"] == 20
        longer = await api.ok("DELETE", PODS + "/p?gracePeriodSeconds=25")
        assert longer["metadata"]["deletionGracePeriodSeconds"] == 20
        shorter = await api.ok("DELETE", PODS + "/p?gracePeriodSeconds=5")
        assert shorter["metadata"]["deletionGracePeriodSeconds"] == 5
        gone = await api.ok("DELETE", PODS + "/p?gracePeriodSeconds=0")
        assert gone["kind"] == "Status"
        await api.fails(404, "GET", PODS + "/p")

    async def test_a_pod_that_no_node_has_goes_at_once(self, api: Api) -> None:
        await api.pod("p")
        assert (await api.ok("DELETE", PODS + "/p"))["kind"] == "Status"

    async def test_a_collection_goes_by_selector(self, api: Api) -> None:
        for name in ("a", "b"):
            await api.configmap(name, app="x")
        await api.configmap("c")
        removed = await api.ok("DELETE", CMS + "?labelSelector=app%3Dx")
        assert [item["metadata"]["name"] for item in removed["items"]] == ["a", "b"]
        left = await api.ok("GET", CMS)
        assert [item["metadata"]["name"] for item in left["items"]] == ["c"]


async def test_what_is_not_served_names_itself(api: Api) -> None:
    for path in ("/apis/networking.k8s.io/v1/namespaces/default/ingresses", "/api/v1/widgets", "/apis/apps/v9/deployments"):
        status = await api.fails(404, "GET", path)
        assert status["message"] == f"the server could not find the requested resource (GET {path})"
    await api.fails(404, "GET", PODS + "/p/nonsense")
    await api.fails(404, "GET", PODS + "/p/status/more")
    await api.fails(404, "GET", "/nowhere")
    await api.fails(404, "GET", "/api/v1/namespaces/default/nodes")
    assert (await api.fails(405, "POST", PODS + "/p", {}))["reason"] == "MethodNotAllowed"


async def test_binding_gives_a_pod_its_node_once(api: Api) -> None:
    await api.pod("p")
    binding = {"target": {"kind": "Node", "name": "n1"}}
    assert (await api("POST", PODS + "/p/binding", binding)).code == 201
    pod = await api.ok("GET", PODS + "/p")
    assert pod["spec"]["nodeName"] == "n1"
    assert [(c["type"], c["status"]) for c in pod["status"]["conditions"]] == [("PodScheduled", "True")]
    status = await api.fails(409, "POST", PODS + "/p/binding", binding)
    assert 'is already assigned to node "n1"' in status["message"]
    await api.fails(422, "POST", PODS + "/p/binding", {"target": {}})


async def test_eviction_is_a_deletion(api: Api) -> None:
    await api.pod("p")
    assert (await api("POST", PODS + "/p/eviction", {"metadata": {"name": "p"}})).code == 201
    await api.fails(404, "GET", PODS + "/p")


async def test_scale(api: Api) -> None:
    path = "/apis/apps/v1/namespaces/default/deployments"
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}
    spec = {"replicas": 2, "selector": {"matchLabels": {"a": "b"}}, "template": template}
    await api.ok("POST", path, {"metadata": {"name": "d"}, "spec": spec})
    scale = await api.ok("GET", path + "/d/scale")
    assert (scale["kind"], scale["spec"]["replicas"], scale["status"]["selector"]) == ("Scale", 2, "a=b")
    scale["spec"]["replicas"] = 5
    assert (await api.ok("PUT", path + "/d/scale", scale))["spec"]["replicas"] == 5
    await api.fails(409, "PUT", path + "/d/scale", scale)
    await api.ok("PATCH", path + "/d/scale", {"spec": {"replicas": 1}}, **MERGE)
    deployment = await api.ok("GET", path + "/d")
    assert (deployment["spec"]["replicas"], deployment["metadata"]["generation"]) == (1, 3)
    await api.fails(422, "PATCH", path + "/d/scale", {"spec": {"replicas": -1}}, **MERGE)


async def test_events_are_one_storage_in_two_versions(api: Api) -> None:
    core = {
        "metadata": {"name": "e", "namespace": "default"},
        "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"},
        "message": "hello",
        "reason": "Why",
        "type": "Normal",
    }
    await api.ok("POST", "/api/v1/namespaces/default/events", core)
    new = await api.ok("GET", "/apis/events.k8s.io/v1/namespaces/default/events/e")
    assert (new["apiVersion"], new["note"], new["regarding"]["name"]) == ("events.k8s.io/v1", "hello", "p")
    listed = await api.ok("GET", "/apis/events.k8s.io/v1/events?fieldSelector=regarding.name%3Dp")
    assert [item["note"] for item in listed["items"]] == ["hello"]
