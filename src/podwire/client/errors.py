"""What an API server (or the way to it) answered instead of what was asked for.

ApiError
├── BadRequest (400)    ├── Unauthorized (401)   ├── Forbidden (403)     ├── NotFound (404)
├── AlreadyExists (409) ├── Conflict (409)       ├── Gone (410)          ├── Invalid (422)
├── TooManyRequests (429)                        ├── ServerError (5xx)
└── Unavailable         no answer at all: refused, reset, timed out
"""

import http
from collections.abc import Mapping
from typing import Any

import msgspec

from podwire.model.errors import PodwireError


class ApiError(PodwireError):
    """A metav1.Status that is no success. `reason` is the API's CamelCase word, `details` its details document."""

    def __init__(self, code: int, reason: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        self.code, self.reason, self.message = code, reason, message
        self.details: Mapping[str, Any] = details or {}
        super().__init__(message)

    @property
    def retry_after(self) -> float:
        """Seconds that the server asked to wait before the next attempt; 0 if it said nothing."""
        value = self.details.get("retryAfterSeconds", 0)
        return float(value) if isinstance(value, int | float) else 0.0


class BadRequest(ApiError):
    pass


class Unauthorized(ApiError):
    pass


class Forbidden(ApiError):
    pass


class NotFound(ApiError):
    pass


class AlreadyExists(ApiError):
    pass


class Conflict(ApiError):
    """Someone else wrote the object since it was read (or a uid precondition failed)."""


class Gone(ApiError):
    """The revision (or the continue token) is no longer in the server's history: list again."""


class Invalid(ApiError):
    pass


class TooManyRequests(ApiError):
    pass


class ServerError(ApiError):
    pass


class Unavailable(ApiError):
    """The server did not answer; whether it acted is unknown. `code` is 0."""

    def __init__(self, message: str) -> None:
        super().__init__(0, "Unavailable", message)


_BY_CODE: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooManyRequests,
}


class _Status(msgspec.Struct, kw_only=True):
    code: int = 0
    reason: str = ""
    message: str = ""
    details: dict[str, Any] | None = None


def error_from_status(document: bytes, http_code: int, what: str) -> ApiError:
    """The error that a response body (a metav1.Status, or anything at all) stands for. `what` is "GET /path"."""
    try:
        status = msgspec.json.decode(document, type=_Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        status = _Status(message=document[:200].decode(errors="replace").strip())
    code = status.code or http_code
    reason = status.reason or http.HTTPStatus(code).phrase.replace(" ", "") if _known(code) else status.reason
    message = status.message or f"{what} was answered with HTTP status {code}"
    kind = AlreadyExists if status.reason == "AlreadyExists" else _BY_CODE.get(code)
    if kind is None:
        kind = ServerError if code >= 500 else ApiError
    return kind(code, reason, message, status.details)


def _known(code: int) -> bool:
    return code in {status.value for status in http.HTTPStatus}
