"""Who asks: bearer tokens, and the service-account tokens that this server hands out. Tokens are never logged."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec

from podwire.apiserver.status import unauthorized

ISSUER = "https://kubernetes.default.svc.cluster.local"


@dataclass(frozen=True, slots=True)
class User:
    """An authenticated user, as user.Info has it."""

    name: str
    groups: tuple[str, ...] = ("system:authenticated",)


ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))
ADMIN = User("kubernetes-admin", ("system:masters", "system:authenticated"))


MASTERS, NODES, BOOTSTRAPPERS = "system:masters", "system:nodes", "system:bootstrappers"


def certificate_user(certificate: Mapping[str, Any] | None) -> User | None:
    """The user that a verified client certificate names, in the form of `ssl.SSLSocket.getpeercert`: its common name is the
    user's, its organisations are the groups. None without one."""
    if not certificate:
        return None
    fields = [pair for part in certificate.get("subject", ()) for pair in part]
    names = [value for key, value in fields if key == "commonName"]
    groups = tuple(value for key, value in fields if key == "organizationName")
    return User(names[0], (*groups, "system:authenticated")) if names else None


class Authenticator:
    """Bearer tokens → users. `tokens` are the fixed ones, `key` signs those of service accounts."""

    def __init__(self, tokens: Mapping[str, User], key: bytes) -> None:
        self._tokens = [(token.encode(), user) for token, user in tokens.items()]
        self._key = key

    def user(self, authorization: str, now: datetime) -> User:
        """The user of an Authorization header; without one ANONYMOUS. Raises StatusError 401 for a token nobody has."""
        if not authorization:
            return ANONYMOUS
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise unauthorized()
        user = self.by_token(token.strip(), now)
        if user is None:
            raise unauthorized()
        return user

    def by_token(self, token: str, now: datetime) -> User | None:
        """The user whose token this is; None if it is nobody's."""
        given = token.encode()
        found: User | None = None
        for known, user in self._tokens:
            # Every token is compared, each in constant time: the answer's timing tells nothing.
            if hmac.compare_digest(known, given):
                found = user
        return found or self._service_account(token, now)

    def sign(self, namespace: str, name: str, audiences: tuple[str, ...], lifetime: timedelta, now: datetime) -> str:
        """A JWT (HS256) for a service account."""
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "aud": list(audiences or (ISSUER,)),
            "sub": f"system:serviceaccount:{namespace}:{name}",
            "iat": int(now.timestamp()),
            "exp": int((now + lifetime).timestamp()),
        }
        signed = _encode(msgspec.json.encode({"alg": "HS256", "typ": "JWT"})) + "." + _encode(msgspec.json.encode(claims))
        return f"{signed}.{_encode(self._mac(signed))}"

    def _service_account(self, token: str, now: datetime) -> User | None:
        signed, _, signature = token.rpartition(".")
        if signed.count(".") != 1 or not hmac.compare_digest(_encode(self._mac(signed)), signature):
            return None
        try:
            claims = msgspec.json.decode(_decode(signed.partition(".")[2]), type=dict[str, Any])
            subject, expires = str(claims["sub"]), int(claims["exp"])
        except (msgspec.DecodeError, binascii.Error, KeyError, ValueError):
            return None
        if expires < now.timestamp():
            return None
        namespace = subject.split(":")[2]
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
        return User(subject, groups)

    def _mac(self, text: str) -> bytes:
        return hmac.new(self._key, text.encode(), hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
