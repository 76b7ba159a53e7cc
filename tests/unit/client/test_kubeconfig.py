import base64
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from podwire.apiserver.app import create_app
from podwire.apiserver.auth import ADMIN
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.pki import Authority, kubeconfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.errors import Unauthorized, Unavailable
from podwire.client.kubeconfig import TokenFile, client_from_kubeconfig, in_cluster_client
from podwire.model.errors import InvalidInput
from podwire.model.resources import NAMESPACES
from podwire.store.memory import MemoryStore


def write(path: Path, **changes: object) -> Path:
    document: dict[str, object] = {
        "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    file = path / "kubeconfig"
    file.write_text(yaml.safe_dump(document | changes))
    return file


def test_the_current_context_is_used(tmp_path: Path) -> None:
    assert client_from_kubeconfig(write(tmp_path)).base_url == "http://127.0.0.1:1"


def test_tls_verifies_unless_told_otherwise(tmp_path: Path) -> None:
    cluster = {"server": "https://127.0.0.1:1", "insecure-skip-tls-verify": True}
    assert client_from_kubeconfig(write(tmp_path, clusters=[{"name": "c", "cluster": cluster}])).tls is not None
    client = client_from_kubeconfig(write(tmp_path, clusters=[{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}]))
    assert client.tls is not None
    assert client.tls.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"current-context": "other"}, "contexts has no entry named 'other'; it has: lab"),
        ({"clusters": []}, "clusters has no entry named 'c'; it has: none"),
        ({"clusters": [{"name": "c", "cluster": {}}]}, "has no server URL"),
        (
            {
                "clusters": [
                    {
                        "name": "c",
                        "cluster": {"server": "https://x", "certificate-authority-data": base64.b64encode(b"no").decode()},
                    }
                ]
            },
            "no PEM certificate",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        client_from_kubeconfig(write(tmp_path, **changes))


def test_a_file_that_is_not_there_or_no_kubeconfig(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        client_from_kubeconfig(tmp_path / "nothing")
    (tmp_path / "list").write_text("[1, 2]")
    with pytest.raises(InvalidInput, match="is not a kubeconfig"):
        client_from_kubeconfig(tmp_path / "list")


async def test_a_servers_own_kubeconfig_lets_in_and_nothing_else_does(tmp_path: Path) -> None:
    authority = Authority.create("test", datetime.now(UTC))
    pair = authority.issue("server", ["127.0.0.1"], datetime.now(UTC))
    store = MemoryStore()
    server = ApiServer(create_app(store, ServerConfig(tokens={"secret": ADMIN})))
    sock = socket.create_server(("127.0.0.1", 0))
    await server.start([Listener(sock, authority.server_context(pair))])
    file = tmp_path / "kubeconfig"
    url = f"https://127.0.0.1:{sock.getsockname()[1]}"
    try:
        file.write_text(kubeconfig("lab", url, authority.pair.certificate, "secret"))
        async with client_from_kubeconfig(file) as client:
            assert {n["metadata"]["name"] for n in (await client.list(NAMESPACES)).items} >= {"default", "kube-system"}
        file.write_text(kubeconfig("lab", url, authority.pair.certificate, "wrong"))
        async with client_from_kubeconfig(file) as client:
            with pytest.raises(Unauthorized):
                await client.list(NAMESPACES)
        other = Authority.create("other", datetime.now(UTC))
        file.write_text(kubeconfig("lab", url, other.pair.certificate, "secret"))
        async with client_from_kubeconfig(file) as client:
            with pytest.raises(Unavailable, match="certificate"):
                await client.list(NAMESPACES)
    finally:
        await server.stop()
        await store.close()


def test_a_token_file_is_read_again_when_it_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    token = TokenFile(file)
    assert token() == "first"
    (tmp_path / "next").write_text("second")
    (tmp_path / "next").rename(file)
    assert token() == "second"
    file.unlink()
    assert token() == "second"


def test_an_account_in_a_cluster(tmp_path: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    with pytest.raises(InvalidInput, match="give a kubeconfig"):
        in_cluster_client({}, tmp_path)
    with pytest.raises(InvalidInput, match=r"ca\.crt: the cluster's CA cannot be read"):
        in_cluster_client(environ, tmp_path)
    authority = Authority.create("ca", datetime.now(UTC))
    (tmp_path / "ca.crt").write_bytes(authority.pair.certificate)
    with pytest.raises(InvalidInput, match="token: the token cannot be read"):
        in_cluster_client(environ, tmp_path)
    (tmp_path / "token").write_text("t")
    assert in_cluster_client(environ, tmp_path).base_url == "https://[fd00::1]:443"
