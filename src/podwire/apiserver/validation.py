"""Field errors in Kubernetes' wording, and the checks that many kinds share.

Texts and limits: k8s.io/apimachinery validation (RFC 1123 labels and subdomains, qualified names, label values, ports).
"""

import ipaddress
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Path:
    """Where in a document: `Path() / "spec" / "ports" @ 0 / "port"` prints as spec.ports[0].port."""

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def __truediv__(self, name: str) -> "Path":
        return Path(f"{self._text}.{name}" if self._text else name)

    def __matmul__(self, index: int | str) -> "Path":
        return Path(f"{self._text}[{index}]")

    def __str__(self) -> str:
        return self._text


class FieldError(NamedTuple):
    """One cause of a 422: `reason` is metav1.CauseType, `message` as Kubernetes words it, `field` a JSON path."""

    reason: str
    message: str
    field: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def quote(value: Any) -> str:
    """A value as Kubernetes prints it in a field error: strings quoted, numbers bare, documents as JSON."""
    if value is None:
        return "null"
    if isinstance(value, (str, dict, list, tuple)):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def invalid(path: Path, value: Any, detail: str) -> FieldError:
    text = f"Invalid value: {quote(value)}"
    return FieldError("FieldValueInvalid", f"{text}: {detail}" if detail else text, str(path))


def required(path: Path, detail: str = "") -> FieldError:
    return FieldError("FieldValueRequired", f"Required value: {detail}" if detail else "Required value", str(path))


def duplicate(path: Path, value: Any) -> FieldError:
    return FieldError("FieldValueDuplicate", f"Duplicate value: {quote(value)}", str(path))


def forbidden(path: Path, detail: str) -> FieldError:
    return FieldError("FieldValueForbidden", f"Forbidden: {detail}", str(path))


def not_found(path: Path, value: Any) -> FieldError:
    return FieldError("FieldValueNotFound", f"Not found: {quote(value)}", str(path))


def unsupported(path: Path, value: Any, supported: Iterable[str]) -> FieldError:
    listed = ", ".join(f'"{s}"' for s in sorted(supported))
    return FieldError("FieldValueNotSupported", f"Unsupported value: {quote(value)}: supported values: {listed}", str(path))


def too_long(path: Path, limit: int) -> FieldError:
    return FieldError("FieldValueTooLong", f"Too long: may not be more than {limit} bytes", str(path))


# --- names --------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_ENV = re.compile(r"[ -<>-~]+")

_LABEL_TEXT = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an "
    "alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_LABEL_1035_TEXT = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end "
    "with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_SUBDOMAIN_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end "
    "with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_QUALIFIED_TEXT = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character "
    "(e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_LABEL_VALUE_TEXT = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with "
    "an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_KEY_TEXT = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or "
    "'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
)
_ENV_TEXT = (
    "a valid environment variable name must consist only of printable ASCII characters other than '=' "
    "(e.g. 'my.env-name', or 'MY_ENV.NAME', or 'MyEnvName1', regex used for validation is '[ -<>-~]+')"
)


def _longer(value: str, limit: int) -> list[str]:
    return [f"must be no more than {limit} bytes"] if len(value.encode()) > limit else []


def dns_label(value: str) -> list[str]:
    """Why `value` is no RFC 1123 label; empty if it is one."""
    return _longer(value, 63) + ([] if _LABEL.fullmatch(value) else [_LABEL_TEXT])


def dns_1035_label(value: str) -> list[str]:
    return _longer(value, 63) + ([] if _LABEL_1035.fullmatch(value) else [_LABEL_1035_TEXT])


def dns_subdomain(value: str) -> list[str]:
    return _longer(value, 253) + ([] if _SUBDOMAIN.fullmatch(value) else [_SUBDOMAIN_TEXT])


def qualified_name(value: str) -> list[str]:
    """Why `value` is no label or annotation key: `[dns-subdomain/]name`."""
    prefix, slash, name = value.rpartition("/")
    problems: list[str] = []
    if slash and "/" in prefix:
        return [
            "a qualified name " + _QUALIFIED_TEXT.removeprefix("name part ") + " with an optional DNS subdomain prefix and '/' "
            "(e.g. 'example.com/MyName')"
        ]
    if slash:
        problems += (
            ["prefix part must be non-empty"] if not prefix else [f"prefix part {text}" for text in dns_subdomain(prefix)]
        )
    if not name:
        problems.append("name part must be non-empty")
    problems += [f"name part {text}" for text in _longer(name, 63)]
    if not _QUALIFIED.fullmatch(name):
        problems.append(_QUALIFIED_TEXT)
    return problems


def label_value(value: str) -> list[str]:
    return _longer(value, 63) + ([] if _LABEL_VALUE.fullmatch(value) else [_LABEL_VALUE_TEXT])


def config_key(value: str) -> list[str]:
    """Why `value` cannot be a key of a ConfigMap or Secret."""
    problems = _longer(value, 253)
    if not _KEY.fullmatch(value):
        problems.append(_KEY_TEXT)
    if value in (".", ".."):
        problems.append(f"must not be '{value}'")
    elif value.startswith(".."):
        problems.append("must not start with '..'")
    return problems


def env_name(value: str) -> list[str]:
    """Why `value` cannot be an environment variable's name (relaxed rule: printable ASCII without '=')."""
    if _ENV.fullmatch(value):
        return []
    return [_ENV_TEXT]


def port_name(value: str) -> list[str]:
    """Why `value` is no IANA service name (a named container port)."""
    problems = ["must be no more than 15 characters"] if len(value) > 15 else []
    if not re.fullmatch(r"[-a-z0-9]+", value):
        problems.append("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")
    if not re.search(r"[a-z]", value):
        problems.append("must contain at least one letter (a-z)")
    if "--" in value:
        problems.append("must not contain consecutive hyphens")
    if value.startswith("-") or value.endswith("-"):
        problems.append("must not begin or end with a hyphen")
    return problems


# --- numbers and addresses ----------------------------------------------------------------------------------------


def port_number(value: Any) -> list[str]:
    ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535
    return [] if ok else ["must be between 1 and 65535, inclusive"]


def non_negative(path: Path, value: Any) -> list[FieldError]:
    if isinstance(value, int) and value < 0:
        return [invalid(path, value, "must be greater than or equal to 0")]
    return []


def ip_address(value: str) -> list[str]:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return ["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"]
    return []


def cidr(value: str) -> list[str]:
    try:
        if "/" in value:
            ipaddress.ip_interface(value)
            return []
    except ValueError:
        pass
    return ["must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"]


def path_segment(value: str) -> list[str]:
    """Why `value` cannot be a part of a URL's path."""
    if value in (".", ".."):
        return [f"may not be '{value}'"]
    return [f"may not contain '{mark}'" for mark in "/%" if mark in value]


def each(path: Path, value: Any, problems: Iterable[str]) -> list[FieldError]:
    """One `Invalid value` for each problem."""
    return [invalid(path, value, problem) for problem in problems]


def one_of(path: Path, value: Any, supported: Iterable[str]) -> list[FieldError]:
    allowed = list(supported)
    return [] if value in allowed else [unsupported(path, value, allowed)]


def immutable(path: Path, new: Any, old: Any) -> list[FieldError]:
    return [] if new == old else [invalid(path, new, "field is immutable")]
