"""kubeconfig files → clients: contexts, clusters (server, CA), users (token, token file, client certificate)."""

import base64
import contextlib
import os
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from podwire.client.api import ApiClient
from podwire.model.errors import InvalidInput
from podwire.model.yamltext import parse_yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its account: ca.crt, namespace, token (which the kubelet replaces before it expires)."""


def client_from_kubeconfig(
    path: Path, context: str | None = None, *, user_agent: str = "podwire", server: str = ""
) -> ApiClient:
    """The client that kubectl with `--kubeconfig path --context context --server server` would be. Raises InvalidInput."""
    document = _load(path)
    context = context or str(document.get("current-context") or "")
    if not context:
        raise InvalidInput(f"{path}: no context is chosen; set current-context (kubectl config use-context)")
    chosen = _named(document, "contexts", "context", context, path)
    cluster = _named(document, "clusters", "cluster", str(chosen.get("cluster", "")), path)
    user = _named(document, "users", "user", str(chosen["user"]), path) if chosen.get("user") else {}
    server = server or str(cluster.get("server", ""))
    if not server.startswith(("http://", "https://")):
        raise InvalidInput(f"{path}: cluster {chosen.get('cluster')!r} has no server URL; set clusters[].cluster.server")
    return ApiClient(
        server,
        token=_token(user, path.parent),
        ssl=_tls(cluster, user, path.parent) if server.startswith("https://") else None,
        user_agent=user_agent,
    )


def in_cluster_client(environ: Mapping[str, str], account: Path = SERVICE_ACCOUNT, *, user_agent: str = "podwire") -> ApiClient:
    """The client of the pod that this runs in, by its service account. Raises InvalidInput where this is no such pod."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise InvalidInput("there is no API server to talk to: give a kubeconfig, or run in a pod with a service account")
    try:
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
    except OSError as error:
        raise InvalidInput(f"{account}/ca.crt: the cluster's CA cannot be read ({error}); mount the service account") from error
    where = f"[{host}]" if ":" in host else host
    return ApiClient(f"https://{where}:{port}", token=TokenFile(account / "token"), ssl=context, user_agent=user_agent)


class TokenFile:
    """A bearer token in a file that others replace. Called, it gives the file's present content."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidInput where it cannot be read."""
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._token = ""
        try:
            self._read()
        except OSError as error:
            raise InvalidInput(f"{path}: the token cannot be read ({error.strerror}); mount or write it there") from error

    def __call__(self) -> str:
        # While the file is away (it is being replaced, say), the last token may still be good.
        with contextlib.suppress(OSError):
            self._read()
        return self._token

    def _read(self) -> None:
        now = self._path.stat()
        if (now.st_mtime_ns, now.st_ino) != self._seen:
            self._token = self._path.read_text().strip()
            self._seen = (now.st_mtime_ns, now.st_ino)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror}); give the path of a kubeconfig file") from error
    documents = parse_yaml(content, str(path))
    document = documents[0] if documents else None
    if not isinstance(document, dict):
        raise InvalidInput(f"{path}: is not a kubeconfig file; it must be a YAML mapping with clusters, users and contexts")
    return document


def _named(document: dict[str, Any], section: str, field: str, name: str, path: Path) -> dict[str, Any]:
    listed = document.get(section)
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    for entry in entries:
        if entry.get("name") == name and isinstance(entry.get(field) or {}, dict):
            return dict(entry.get(field) or {})
    known = ", ".join(str(entry.get("name")) for entry in entries) or "none"
    raise InvalidInput(f"{path}: {section} has no entry named {name!r}; it has: {known}")


def _token(user: dict[str, Any], base: Path) -> str | TokenFile | None:
    if user.get("tokenFile"):  # client-go: the file has precedence
        return TokenFile(base / str(user["tokenFile"]))
    return str(user["token"]) if user.get("token") else None


def _tls(cluster: dict[str, Any], user: dict[str, Any], base: Path) -> ssl.SSLContext:
    authority = _bytes(cluster, "certificate-authority", base)
    try:
        context = ssl.create_default_context(cadata=authority.decode() if authority else None)
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise InvalidInput(
            "the kubeconfig's certificate-authority is no PEM certificate; take it from the cluster again"
        ) from error
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    certificate, key = _bytes(user, "client-certificate", base), _bytes(user, "client-key", base)
    if certificate and key:
        _load_pair(context, certificate, key)
    return context


def _bytes(section: dict[str, Any], field: str, base: Path) -> bytes | None:
    """`<field>-data` (base64) or the content of the file `<field>`, relative to the kubeconfig's directory."""
    if section.get(f"{field}-data"):
        try:
            return base64.b64decode(str(section[f"{field}-data"]))
        except ValueError as error:
            raise InvalidInput(f"the kubeconfig's {field}-data is no base64; take it from the cluster again") from error
    if section.get(field):
        file = base / str(section[field])
        try:
            return file.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{file}: the kubeconfig's {field} cannot be read ({error.strerror})") from error
    return None


def _load_pair(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """OpenSSL takes a key from a file only: a private one that lives as long as the call."""
    with tempfile.NamedTemporaryFile() as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(certificate + b"\n" + key)
        file.flush()
        try:
            context.load_cert_chain(file.name)
        except ssl.SSLError as error:
            raise InvalidInput("the kubeconfig's client certificate and key do not fit together") from error
