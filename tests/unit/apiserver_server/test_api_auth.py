"""Who gets in, over plain sockets and over TLS."""

import logging
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from apirig import Serve
from cryptography import x509

from podwire.apiserver.app import create_app
from podwire.apiserver.auth import ADMIN, Authenticator, User
from podwire.apiserver.config import KubeletAccess, ServerConfig
from podwire.apiserver.pki import Authority, kubeconfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.client.errors import Unauthorized, Unavailable
from podwire.client.kubeconfig import client_from_kubeconfig
from podwire.model.resources import NAMESPACES
from podwire.store.memory import MemoryStore

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = ServerConfig(tokens={"secret-token": ADMIN, "other-token": User("bob")})


async def test_without_a_known_token_nobody_gets_in(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    api = await serve(config=CONFIG)
    for headers in ({}, {"Authorization": "Bearer wrong-token"}, {"Authorization": "Basic c2VjcmV0"}, {"Authorization": "x"}):
        for path in ("/api/v1/pods", "/apis", "/openapi/v3", "/nowhere"):
            assert (await api.fails(401, "GET", path, **headers))["reason"] == "Unauthorized"
    for path in ("/healthz", "/readyz", "/livez", "/version"):
        assert (await api("GET", path)).code == 200
    assert "wrong-token" not in caplog.text


async def test_each_token_is_its_user(serve: Serve) -> None:
    url = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    config = ServerConfig(tokens=CONFIG.tokens)
    for token, name in (("secret-token", "kubernetes-admin"), ("other-token", "bob")):
        api = await serve(config=config, token=token)
        assert (await api.ok("POST", url, {}))["status"]["userInfo"]["username"] == name


async def test_a_service_accounts_token_is_taken_until_it_expires(serve: Serve) -> None:
    clock = [NOW]
    config = ServerConfig(tokens={"secret-token": ADMIN}, now=lambda: clock[0], signing_key=b"k" * 32)
    api = await serve(config=config, token="secret-token")
    await api.ok("POST", "/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "robot"}})
    request = {"spec": {"expirationSeconds": 600}}
    answer = await api.ok("POST", "/api/v1/namespaces/default/serviceaccounts/robot/token", request)
    token = answer["status"]["token"]
    assert answer["status"]["expirationTimestamp"] == "2026-01-01T00:10:00Z"
    own = {"Authorization": f"Bearer {token}"}
    who = await api.ok("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", {}, **own)
    assert who["status"]["userInfo"]["username"] == "system:serviceaccount:default:robot"
    clock[0] = NOW + timedelta(seconds=601)
    await api.fails(401, "GET", "/api/v1/pods", **own)
    await api.fails(404, "POST", "/api/v1/namespaces/default/serviceaccounts/nobody/token", request)


def test_a_token_signed_by_another_key_is_nobodys() -> None:
    ours, theirs = Authenticator({}, b"a" * 32), Authenticator({}, b"b" * 32)
    token = theirs.sign("default", "robot", (), timedelta(hours=1), NOW)
    assert theirs.by_token(token, NOW) is not None
    assert ours.by_token(token, NOW) is None
    for broken in ("", ".", "a.b", "a.b.c", token[:-1], token + "x"):
        assert theirs.by_token(broken, NOW) is None


async def test_tls_with_the_kubeconfig_that_is_handed_out(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create("podwire lab", now)
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"https://127.0.0.1:{listening.getsockname()[1]}"
    store = MemoryStore()
    server = ApiServer(create_app(store, CONFIG))
    tls = authority.server_context(authority.issue("kube-apiserver", ["127.0.0.1", "kubernetes"], now))
    await server.start([Listener(listening, tls)])
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig("lab", url, authority.pair.certificate, "secret-token"))
    try:
        async with client_from_kubeconfig(path) as client:
            assert (await client.get(NAMESPACES, "default"))["metadata"]["name"] == "default"
        async with ApiClient(url, ssl=authority.client_context(), token="wrong") as client:
            with pytest.raises(Unauthorized):
                await client.get(NAMESPACES, "default")
        stranger = Authority.create("someone else", now)
        async with ApiClient(url, ssl=stranger.client_context(), token="secret-token") as client:
            with pytest.raises(Unavailable):
                await client.get(NAMESPACES, "default")
    finally:
        await server.stop()
        await store.close()


def test_certificates_say_what_they_are_for() -> None:
    authority = Authority.create("podwire lab", NOW)
    pair = authority.issue("node-1", ["node-1", "198.18.0.11", "2001:db8:1::b"], NOW, organisations=["system:nodes"])
    certificate = x509.load_pem_x509_certificate(pair.certificate)
    assert certificate.not_valid_before_utc < NOW < certificate.not_valid_after_utc
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-1"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["198.18.0.11", "2001:db8:1::b"]
    ca = x509.load_pem_x509_certificate(authority.pair.certificate)
    certificate.verify_directly_issued_by(ca)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_kubeconfig_holds_one_context() -> None:
    text = kubeconfig("lab", "https://127.0.0.1:1", b"CA", "t", namespace="shop")
    document = yaml.safe_load(text)
    assert document["current-context"] == "lab"
    assert document["contexts"][0]["context"] == {"cluster": "lab", "user": "lab", "namespace": "shop"}
    assert document["users"][0]["user"] == {"token": "t"}


def test_the_contexts_verify() -> None:
    authority = Authority.create("podwire lab", NOW)
    assert authority.client_context().verify_mode is ssl.CERT_REQUIRED
    assert authority.client_context(authority.issue("c", [], NOW)).check_hostname


def test_nothing_secret_is_in_what_is_printed() -> None:
    authority = Authority.create("podwire lab", NOW)
    config = ServerConfig(tokens={"secret-token": ADMIN}, kubelet=KubeletAccess("node-token"), signing_key=b"signing-key")
    shown = repr(config) + repr(authority)
    assert not any(secret in shown for secret in ("secret-token", "node-token", "signing-key", "PRIVATE KEY"))
