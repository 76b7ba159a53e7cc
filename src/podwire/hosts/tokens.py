"""Making join tokens: bootstrap tokens as kubeadm's, with the authority's fingerprint behind them."""

import base64
import secrets
import string
from datetime import datetime, timedelta
from typing import Any

from podwire.client.api import ApiClient
from podwire.hosts.membership import JoinToken
from podwire.model.resources import SECRETS
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


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
