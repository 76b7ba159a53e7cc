"""What can go wrong with a request, as metav1.Status: HTTP code, machine-readable reason, Kubernetes' own wording.

`StatusError` is the only exception by which a verb refuses; the server turns it into a response in one place.
Texts: k8s.io/apimachinery api/errors.
"""

from collections.abc import Sequence

from podwire.apiserver.validation import FieldError
from podwire.model.errors import PodwireError
from podwire.model.meta import Json
from podwire.model.resources import Resource


class StatusError(PodwireError):
    """A refusal with everything that metav1.Status says of it."""

    def __init__(self, code: int, reason: str, message: str, details: Json | None = None) -> None:
        self.code, self.reason, self.message, self.details = code, reason, message, details or {}
        super().__init__(message)

    def document(self) -> Json:
        return failure(self.code, self.reason, self.message, self.details)


def failure(code: int, reason: str, message: str, details: Json | None = None) -> Json:
    """The Status document of a failure."""
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    if reason:
        status["reason"] = reason
    if details:
        status["details"] = details
    return {**status, "code": code}


def success(details: Json) -> Json:
    """The Status document that answers a completed deletion."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def qualified(resource: Resource) -> str:
    """`pods`, `deployments.apps`: how messages name a resource."""
    return f"{resource.plural}.{resource.group}" if resource.group else resource.plural


def details_of(resource: Resource, name: str) -> Json:
    """StatusDetails: its `kind` is the plural, as Kubernetes has it."""
    details = {"name": name, "group": resource.group, "kind": resource.plural}
    return {key: value for key, value in details.items() if value}


def not_found(resource: Resource, name: str) -> StatusError:
    return StatusError(404, "NotFound", f'{qualified(resource)} "{name}" not found', details_of(resource, name))


def already_exists(resource: Resource, name: str) -> StatusError:
    return StatusError(409, "AlreadyExists", f'{qualified(resource)} "{name}" already exists', details_of(resource, name))


def conflict(resource: Resource, name: str, why: str = "") -> StatusError:
    """A lost race or a failed precondition; the default text is that of a stale resourceVersion."""
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {qualified(resource)} "{name}": {why}'
    return StatusError(409, "Conflict", message, details_of(resource, name))


def forbidden(resource: Resource, name: str, why: str, causes: Sequence[Json] = ()) -> StatusError:
    details = details_of(resource, name) | ({"causes": list(causes)} if causes else {})
    return StatusError(403, "Forbidden", f'{qualified(resource)} "{name}" is forbidden: {why}', details)


def terminating(resource: Resource, name: str, namespace: str) -> StatusError:
    """Nothing new in a namespace on its way out."""
    why = f"unable to create new content in namespace {namespace} because it is being terminated"
    cause = {
        "reason": "NamespaceTerminating",
        "message": f"namespace {namespace} is being terminated",
        "field": "metadata.namespace",
    }
    return forbidden(resource, name, why, [cause])


def invalid(resource: Resource, name: str, errors: Sequence[FieldError]) -> StatusError:
    """422 with a cause for each field."""
    listed = str(errors[0]) if len(errors) == 1 else "[" + ", ".join(map(str, errors)) + "]"
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    causes = [{"reason": e.reason, "message": e.message, "field": e.field} for e in errors]
    details = {"name": name, "group": resource.group, "kind": resource.kind, "causes": causes}
    details = {key: value for key, value in details.items() if value}
    return StatusError(422, "Invalid", f'{kind} "{name}" is invalid: {listed}', details)


def invalid_options(why: str) -> StatusError:
    """422 for list or watch options that do not go together."""
    return StatusError(422, "Invalid", f'ListOptions.meta.k8s.io "" is invalid: {why}')


def bad_request(message: str) -> StatusError:
    return StatusError(400, "BadRequest", message)


def unauthorized() -> StatusError:
    return StatusError(401, "Unauthorized", "Unauthorized")


def unknown_path(method: str, path: str) -> StatusError:
    """No such group, version, kind or subresource. Clients print the message as it is, so it names what was asked for."""
    return StatusError(404, "NotFound", f"the server could not find the requested resource ({method} {path})")


def method_not_allowed(resource: Resource, method: str) -> StatusError:
    message = f"the server does not allow this method on the requested resource ({method} {qualified(resource)})"
    return StatusError(405, "MethodNotAllowed", message, details_of(resource, ""))


def not_acceptable(supported: str) -> StatusError:
    message = f"only the following media types are accepted: {supported}"
    return StatusError(406, "NotAcceptable", message)


def unsupported_media_type(given: str, supported: str) -> StatusError:
    message = f"the body of the request was in an unknown format ({given}) - accepted media types include: {supported}"
    return StatusError(415, "UnsupportedMediaType", message)


def too_large(limit: int) -> StatusError:
    return StatusError(413, "RequestEntityTooLarge", f"Request entity too large: limit is {limit}")


def expired(message: str) -> StatusError:
    """The revision asked for has been compacted away: list again."""
    return StatusError(410, "Expired", message)


def version_too_large(wanted: int, current: int) -> StatusError:
    """A resourceVersion that does not exist yet, as of a client that outlived its server's data."""
    message = f"Too large resource version: {wanted}, current: {current}"
    causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
    return StatusError(504, "Timeout", f"Timeout: {message}", {"causes": causes, "retryAfterSeconds": 1})


def unavailable(message: str) -> StatusError:
    return StatusError(503, "ServiceUnavailable", message)


def internal(message: str) -> StatusError:
    return StatusError(500, "InternalError", f"Internal error occurred: {message}")
