"""How machines join: tokens (bootstrap tokens as kubeadm's, with the authority's fingerprint behind them), and where to."""

import base64
import secrets
import string
from datetime import datetime, timedelta
from typing import Any

from podwire.client.api import ApiClient
from podwire.client.errors import NotFound
from podwire.hosts.membership import JoinToken
from podwire.model.resources import ENDPOINTSLICES, SECRETS
from podwire.model.timestamps import format_time

_ALPHABET = string.ascii_lowercase + string.digits


async def create_token(admin: ApiClient, fingerprint: str, now: datetime, life: timedelta | None) -> JoinToken:
    """A new token that ends after `life` (None: never). Raises ApiError."""
    identifier, secret = (_random(length) for length in (6, 16))
    data = {
        "token-id": identifier,
        "token-secret": secret,
        "usage-bootstrap-authentication": "true",
        "description": "podwire join",
    }
    if life is not None:
        data["expiration"] = format_time(now + life)
    document: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"bootstrap-token-{identifier}", "namespace": "kube-system"},
        "type": "bootstrap.kubernetes.io/token",
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }
    await admin.create(SECRETS, document)
    return JoinToken(f"{identifier}.{secret}", fingerprint)


async def server_urls(admin: ApiClient) -> tuple[str, ...]:
    """Of all servers of the cluster that live, `admin`'s own first. Raises ApiError."""
    own = admin.base_url
    try:
        known = await admin.get(ENDPOINTSLICES, "kubernetes", "default")
    except NotFound:
        return (own,)
    hosts = [address for endpoint in known["endpoints"] for address in endpoint["addresses"]]
    port = known["ports"][0]["port"]
    urls = [f"https://{f'[{host}]' if ':' in host else host}:{port}" for host in hosts]
    return tuple(dict.fromkeys((own, *urls))) if own in urls else (own,)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
