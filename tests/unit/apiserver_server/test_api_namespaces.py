"""The life of a namespace, and of what is in it."""

import asyncio

from apirig import Api

NS = "/api/v1/namespaces"


async def test_a_namespace_goes_when_its_finalizer_does(api: Api) -> None:
    made = await api.ok("POST", NS, {"metadata": {"name": "shop"}})
    assert (made["spec"]["finalizers"], made["status"]["phase"]) == (["kubernetes"], "Active")
    going = await api.ok("DELETE", NS + "/shop")
    assert (going["status"]["phase"], bool(going["metadata"]["deletionTimestamp"])) == ("Terminating", True)
    status = await api.fails(403, "POST", NS + "/shop/configmaps", {"metadata": {"name": "a"}})
    assert status["reason"] == "Forbidden"
    assert status["details"]["causes"][0]["reason"] == "NamespaceTerminating"
    assert "because it is being terminated" in status["message"]
    await api.ok("PUT", NS + "/shop/finalize", {**going, "spec": {"finalizers": []}})
    await api.fails(404, "GET", NS + "/shop")


async def test_an_ordinary_update_does_not_finalize(api: Api) -> None:
    made = await api.ok("POST", NS, {"metadata": {"name": "shop"}})
    kept = await api.ok("PUT", NS + "/shop", {**made, "spec": {"finalizers": []}})
    assert kept["spec"]["finalizers"] == ["kubernetes"]


async def test_a_stale_finalize_is_a_conflict(api: Api) -> None:
    made = await api.ok("POST", NS, {"metadata": {"name": "shop"}})
    await api.ok("DELETE", NS + "/shop")
    await api.fails(409, "PUT", NS + "/shop/finalize", {**made, "spec": {"finalizers": []}})


async def test_the_systems_own_namespaces_stay(api: Api) -> None:
    for name in ("default", "kube-system", "kube-public"):
        status = await api.fails(403, "DELETE", f"{NS}/{name}")
        assert status["message"] == f'namespaces "{name}" is forbidden: this namespace may not be deleted'


async def test_nothing_is_left_in_a_namespace_that_went(api: Api) -> None:
    """Creations race with the deletion of an empty namespace: each is either refused or there before it goes."""
    for round_ in range(10):
        name = f"ns{round_}"
        made = await api.ok("POST", NS, {"metadata": {"name": name}})
        configs = f"{NS}/{name}/configmaps"
        creations = [asyncio.create_task(api("POST", configs, {"metadata": {"name": f"c{n}"}})) for n in range(8)]
        going = await api.ok("DELETE", f"{NS}/{name}")
        held = {item["metadata"]["name"] for item in (await api.ok("GET", configs))["items"]}
        await api.ok("PUT", f"{NS}/{name}/finalize", {**going, "spec": {"finalizers": []}})
        answers = await asyncio.gather(*creations)
        assert {answer.code for answer in answers} <= {201, 403, 404}
        assert {a.doc["metadata"]["name"] for a in answers if a.code == 201} == held
        assert made["metadata"]["uid"] == going["metadata"]["uid"]
