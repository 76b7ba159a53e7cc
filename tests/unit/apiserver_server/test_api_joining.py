"""Joining with a bootstrap token, certificates as identities, and what a node may do with its own."""

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import pytest

from podwire.apiserver.app import create_app
from podwire.apiserver.auth import ADMIN, certificate_user
from podwire.apiserver.config import KubeletAccess, ServerConfig
from podwire.apiserver.noderules import referenced
from podwire.apiserver.pki import Authority, KeyPair, expiry, fingerprint, new_request
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.client.errors import ApiError, Conflict, Forbidden, NotFound, Unauthorized
from podwire.model.errors import InvalidInput
from podwire.model.resources import (
    CONFIGMAPS,
    DEPLOYMENTS,
    ENDPOINTSLICES,
    EVENTS,
    LEASES,
    NODES,
    PODS,
    SECRETS,
    SERVICECIDRS,
    SERVICES,
)
from podwire.store.memory import MemoryStore

TOKEN = "abcdef.0123456789abcdef"
MIRROR = {"kubernetes.io/config.mirror": "x"}


class Cluster:
    def __init__(self, authority: Authority, port: int, stack: AsyncExitStack) -> None:
        self.authority, self.url, self._stack = authority, f"https://127.0.0.1:{port}", stack

    async def client(self, token: str | None = None, pair: KeyPair | None = None) -> ApiClient:
        tls = self.authority.client_context(pair)
        return await self._stack.enter_async_context(ApiClient(self.url, token=token, ssl=tls))

    async def join(self, name: str, *addresses: str, token: str = TOKEN) -> tuple[ApiClient, Any]:
        key, request = new_request("whoever")
        bootstrap = await self.client(token)
        body = {"name": name, "request": request.decode(), "addresses": addresses}
        answer = _json(await bootstrap.request("POST", "/podwire/v1/join", body=body))
        return await self.client(pair=KeyPair(answer["certificate"].encode(), key)), answer


def _json(data: bytes) -> Any:
    return json.loads(data)


@asynccontextmanager
async def running(now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> AsyncIterator[Cluster]:
    authority = Authority.create("podwire", datetime.now(UTC))
    config = ServerConfig(
        tokens={"admin": ADMIN},
        advertise=(ip_address("192.0.2.1"),),
        kubelet=KubeletAccess(key=b"k"),
        authority=authority,
        cluster_settings={"podCIDRs": ["10.244.0.0/16"]},
        now=now,
    )
    async with AsyncExitStack() as stack:
        store = MemoryStore()
        stack.push_async_callback(store.close)
        server = ApiServer(create_app(store, config))
        stack.push_async_callback(server.stop)
        sock = socket.create_server(("127.0.0.1", 0))
        pair = authority.issue("kube-apiserver", ["127.0.0.1"], datetime.now(UTC))
        await server.start([Listener(sock, authority.server_context(pair, ask_clients=True))])
        yield Cluster(authority, sock.getsockname()[1], stack)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running() as made:
        await add_token(await made.client("admin"))
        yield made


async def add_token(admin: ApiClient, **data: str) -> None:
    fields = {"token-id": TOKEN[:6], "token-secret": TOKEN[7:], "usage-bootstrap-authentication": "true"} | data
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in fields.items()}
    meta = {"name": f"bootstrap-token-{TOKEN[:6]}", "namespace": "kube-system"}
    await admin.create(SECRETS, {"metadata": meta, "type": "bootstrap.kubernetes.io/token", "data": encoded})


def pod(name: str, node: str = "", **spec: Any) -> Any:
    document = {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"containers": [{"name": "c", "image": "i"}], **spec},
    }
    if node:
        document["spec"]["nodeName"] = node
    return document


async def test_a_token_gives_a_certificate_and_the_certificate_an_identity(cluster: Cluster) -> None:
    node, answer = await cluster.join("node-a", "192.0.2.10")
    assert answer["cluster"] == {"podCIDRs": ["10.244.0.0/16"]}
    assert answer["kubeletToken"] != (await cluster.join("node-b"))[1]["kubeletToken"]
    assert fingerprint(answer["authority"].encode()) == cluster.authority.fingerprint
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    user = _json(await node.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=review))
    assert user["status"]["userInfo"]["username"] == "system:node:node-a"
    assert "system:nodes" in user["status"]["userInfo"]["groups"]
    anybody = await cluster.client()
    assert await anybody.request("GET", "/podwire/v1/ca") == cluster.authority.pair.certificate
    with pytest.raises(Unauthorized):
        await anybody.list(PODS)


async def test_a_bootstrap_token_is_good_for_nothing_else(cluster: Cluster) -> None:
    bootstrap = await cluster.client(TOKEN)
    for attempt in (bootstrap.list(PODS), bootstrap.list(SECRETS), bootstrap.list(NODES)):
        with pytest.raises(Forbidden, match="may only join"):
            await attempt
    for wrong in ("abcdef.0123456789abcdee", "zzzzzz.0123456789abcdef"):
        with pytest.raises(Unauthorized):
            await cluster.join("node-a", token=wrong)
    with pytest.raises(Forbidden, match="only a bootstrap token"):
        await cluster.join("node-a", token="admin")


async def test_an_expired_token_is_none() -> None:
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]
    async with running(lambda: clock[0]) as cluster:
        await add_token(await cluster.client("admin"), expiration="2026-01-01T01:00:00Z")
        bootstrap = await cluster.client(TOKEN)
        with pytest.raises(Forbidden):
            await bootstrap.list(PODS)
        clock[0] += timedelta(hours=1)
        with pytest.raises(Unauthorized):
            await bootstrap.list(PODS)


async def test_a_living_nodes_name_is_not_given_away(cluster: Cluster) -> None:
    node, _ = await cluster.join("node-a")
    await node.create(NODES, {"metadata": {"name": "node-a"}})
    await cluster.join("node-a")  # it never got ready: an attempt that failed half-way
    ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    await node.patch(NODES, "node-a", ready, subresource="status")
    with pytest.raises(Conflict, match="is there and ready"):
        await cluster.join("node-a")


@pytest.mark.parametrize("address", ["192.0.2.1", "10.96.0.1", "10.112.0.9", "nowhere"])
async def test_a_certificate_in_the_servers_or_a_services_name_is_refused(cluster: Cluster, address: str) -> None:
    admin = await cluster.client("admin")
    await admin.create(SERVICECIDRS, {"metadata": {"name": "more"}, "spec": {"cidrs": ["10.112.0.0/24"]}})
    await admin.list(SERVICECIDRS)
    with pytest.raises(ApiError):
        await cluster.join("node-a", address)


async def test_a_node_renews_its_own_certificate_only(cluster: Cluster) -> None:
    node, answer = await cluster.join("node-a")
    key, request = new_request("x")
    body = {"name": "node-a", "request": request.decode()}
    fresh = _json(await node.request("POST", "/podwire/v1/renew", body=body))
    assert expiry(fresh["certificate"].encode()) >= expiry(answer["certificate"].encode())
    renewed = await cluster.client(pair=KeyPair(fresh["certificate"].encode(), key))
    await renewed.list(NODES)
    with pytest.raises(Forbidden):
        await node.request("POST", "/podwire/v1/renew", body=body | {"name": "node-b"})


async def test_a_certificate_of_another_authority_is_nobodys(cluster: Cluster) -> None:
    stranger = Authority.create("podwire", datetime.now(UTC))
    pair = stranger.issue("system:node:node-a", [], datetime.now(UTC), organisations=("system:nodes",))
    client = await cluster.client(pair=pair)
    with pytest.raises(ApiError):
        await client.list(NODES)


async def test_what_a_node_may_do(cluster: Cluster) -> None:
    admin = await cluster.client("admin")
    node, _ = await cluster.join("node-a")
    await node.create(NODES, {"metadata": {"name": "node-a"}})
    await node.patch(NODES, "node-a", {"metadata": {"annotations": {"a": "b"}}})
    lease = {"metadata": {"name": "node-a", "namespace": "kube-node-lease"}, "spec": {"holderIdentity": "node-a"}}
    await node.create(LEASES, lease)
    await node.patch(LEASES, "node-a", {"spec": {"leaseDurationSeconds": 40}}, "kube-node-lease")
    said = {"metadata": {"name": "podwire-services-node-a", "namespace": "kube-system"}, "spec": {}}
    await node.create(LEASES, said)
    for resource in (SERVICES, ENDPOINTSLICES, NODES):
        await node.list(resource)
    await admin.create(CONFIGMAPS, {"metadata": {"name": "mine", "namespace": "default"}, "data": {}})
    await admin.create(PODS, pod("p", "node-a", volumes=[{"name": "v", "configMap": {"name": "mine"}}]))
    assert [p["metadata"]["name"] for p in (await node.list(PODS, field_selector="spec.nodeName=node-a")).items] == ["p"]
    await node.get(CONFIGMAPS, "mine", "default")
    await node.patch(PODS, "p", {"status": {"phase": "Running"}}, "default", subresource="status")
    reference = {"kind": "Pod", "name": "p", "namespace": "default"}
    await node.create(EVENTS, {"metadata": {"name": "e", "namespace": "default"}, "involvedObject": reference})
    await node.delete(PODS, "p", "default", grace_period_seconds=0)
    mirror = pod("m", "node-a")
    mirror["metadata"]["annotations"] = MIRROR
    await node.create(PODS, mirror)
    await node.patch(PODS, "m", {"metadata": {"labels": {"app": "x"}}}, "default")
    with pytest.raises(NotFound):
        await node.get(PODS, "nobody", "default")
    await node.delete(NODES, "node-a")


async def test_what_a_node_may_not_do(cluster: Cluster) -> None:
    admin = await cluster.client("admin")
    node, _ = await cluster.join("node-a")
    await admin.create(NODES, {"metadata": {"name": "node-b"}})
    await admin.create(PODS, pod("theirs", "node-b", volumes=[{"name": "v", "secret": {"secretName": "s"}}]))
    await admin.create(PODS, pod("mine", "node-a"))
    await admin.create(SECRETS, {"metadata": {"name": "s", "namespace": "default"}})
    foreign_mirror = pod("m", "node-b")
    foreign_mirror["metadata"]["annotations"] = MIRROR
    attempts = [
        node.create(NODES, {"metadata": {"name": "node-c"}}),
        node.patch(NODES, "node-b", {"metadata": {"labels": {"a": "b"}}}),
        node.delete(NODES, "node-b"),
        node.request("DELETE", "/api/v1/nodes"),
        node.list(PODS),
        node.list(PODS, field_selector="spec.nodeName=node-b"),
        node.list(PODS, field_selector="spec.nodeName!=node-a"),
        node.get(PODS, "theirs", "default"),
        node.delete(PODS, "theirs", "default"),
        node.request("DELETE", "/api/v1/namespaces/default/pods"),
        node.patch(PODS, "theirs", {"status": {"phase": "Failed"}}, "default", subresource="status"),
        node.patch(PODS, "mine", {"metadata": {"labels": {"app": "web"}}}, "default"),
        node.create(PODS, pod("new", "node-a")),
        node.create(PODS, foreign_mirror),
        node.get(SECRETS, "s", "default"),
        node.list(SECRETS),
        node.list(CONFIGMAPS),
        node.get(LEASES, "podwire-controllers", "kube-system"),
        node.list(DEPLOYMENTS),
        node.create(SERVICES, {"metadata": {"name": "s", "namespace": "default"}, "spec": {"ports": [{"port": 1}]}}),
        node.request("POST", "/podwire/v1/join", body={"name": "node-x", "request": ""}),
    ]
    for outcome in await asyncio.gather(*attempts, return_exceptions=True):
        assert isinstance(outcome, Forbidden), outcome


def test_what_pods_refer_to() -> None:
    spec = {
        "imagePullSecrets": [{"name": "pull"}],
        "volumes": [
            {"configMap": {"name": "c1"}},
            {"secret": {"secretName": "s1"}},
            {"projected": {"sources": [{"configMap": {"name": "c2"}}, {"secret": {"name": "s2"}}]}},
        ],
        "containers": [
            {
                "envFrom": [{"configMapRef": {"name": "c3"}}, {"secretRef": {"name": "s3"}}],
                "env": [{"name": "a", "valueFrom": {"secretKeyRef": {"name": "s4", "key": "k"}}}, {"name": "b", "value": "c"}],
            }
        ],
        "initContainers": [{"env": [{"name": "a", "valueFrom": {"configMapKeyRef": {"name": "c4", "key": "k"}}}]}],
    }
    assert set(referenced(spec, "configmaps")) - {""} == {"c1", "c2", "c3", "c4"}
    assert set(referenced(spec, "secrets")) - {""} == {"pull", "s1", "s2", "s3", "s4"}


def test_requests_that_are_none() -> None:
    authority = Authority.create("x", datetime.now(UTC))
    for text in (b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"):
        with pytest.raises(InvalidInput):
            authority.sign(text, "n", [], datetime.now(UTC), ())
    with pytest.raises(InvalidInput):
        fingerprint(b"no")


def test_users_of_certificates() -> None:
    subject = ((("organizationName", "system:nodes"),), (("commonName", "system:node:a"),))
    user = certificate_user({"subject": subject})
    assert user is not None
    assert (user.name, user.groups) == ("system:node:a", ("system:nodes", "system:authenticated"))
    assert certificate_user(None) is None
    assert certificate_user({"subject": ()}) is None
