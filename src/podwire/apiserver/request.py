"""A request as values: which kind and object its path names, what its query asks for, how its answer is to be written."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import yaml

from podwire.apiserver.hub import Form
from podwire.apiserver.kinds import REGISTRY, Kind
from podwire.apiserver.selectors import EVERYTHING, Selector, parse_fields, parse_labels
from podwire.apiserver.status import StatusError, bad_request, expired, invalid_options, not_acceptable, unsupported_media_type
from podwire.model.meta import Json

JSON = "application/json"
YAML = "application/yaml"
PROTOBUF = "application/vnd.kubernetes.protobuf"


class Target(NamedTuple):
    """What a URL path names. No `name`: the collection; no `namespace`: all of them (or a cluster-scoped kind)."""

    kind: Kind
    namespace: str = ""
    name: str = ""
    subresource: str = ""


def parse_path(path: str) -> Target | None:
    """`/api/v1/namespaces/shop/pods/web/log`, `/apis/apps/v1/deployments`, … ; None where no such resource is served."""
    parts = path.strip("/").split("/")
    if parts[0] == "api" and len(parts) >= 3:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[0] == "apis" and len(parts) >= 4:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    namespace = ""
    if rest[0] == "namespaces" and len(rest) >= 3 and (kind := REGISTRY.by_path(group, version, rest[2])) is not None:
        if not kind.resource.namespaced:
            return None
        namespace, rest = rest[1], rest[2:]
    else:
        found = REGISTRY.by_path(group, version, rest[0])
        if found is None or (found.resource.namespaced and len(rest) > 1):
            return None
        kind = found
    name, subresource = [*rest[1:3], "", ""][:2]
    if len(rest) > 3 or (subresource and all(sub.name != subresource for sub in kind.subresources)):
        return None
    return Target(kind, namespace, name, subresource)


@dataclass(frozen=True, slots=True)
class ListOptions:
    """metav1.ListOptions of a list or watch; an empty resourceVersion was not given.

    `at` and `after` come from a continue token: the revision of the first page and the last key that was shown."""

    labels: Selector = EVERYTHING
    fields: Selector = EVERYTHING
    resource_version: str = ""
    match: str = ""
    limit: int = 0
    after: str = ""
    at: int = 0
    watch: bool = False
    bookmarks: bool = False
    initial_events: bool | None = None
    timeout_seconds: int = 0


def list_options(kind: Kind, query: Mapping[str, str], name: str = "") -> ListOptions:
    """Raises StatusError 400 for what cannot be read. `name` narrows a watch of one object."""
    supported = kind.selectable_fields({"metadata": {}})
    field_text = query.get("fieldSelector", "")
    if name:
        field_text = ",".join(filter(None, [f"metadata.name={name}", field_text]))
    at, after = parse_continue(query["continue"]) if query.get("continue") else (0, "")
    version = query.get("resourceVersion", "")
    if version and not version.isdigit():
        raise bad_request(f"invalid resource version {version!r}: must be a number")
    initial, match = query.get("sendInitialEvents"), query.get("resourceVersionMatch", "")
    if match not in ("", "Exact", "NotOlderThan"):
        raise invalid_options(f'resourceVersionMatch: Unsupported value: "{match}": supported values: "Exact", "NotOlderThan"')
    if initial is not None and not flag(query, "watch"):
        raise invalid_options("sendInitialEvents: Forbidden: sendInitialEvents is forbidden for list")
    if match == "Exact" and version in ("", "0"):
        raise invalid_options("resourceVersionMatch: Forbidden: Exact needs a resourceVersion other than 0")
    return ListOptions(
        labels=parse_labels(query.get("labelSelector", "")),
        fields=parse_fields(field_text, supported),
        resource_version=version,
        match=match,
        limit=_number(query, "limit"),
        after=after,
        at=at,
        watch=flag(query, "watch"),
        bookmarks=flag(query, "allowWatchBookmarks"),
        initial_events=None if initial is None else flag(query, "sendInitialEvents"),
        timeout_seconds=_number(query, "timeoutSeconds"),
    )


def flag(query: Mapping[str, str], name: str) -> bool:
    """A boolean parameter, as Kubernetes reads them: present and neither `false` nor `0`."""
    return query.get(name, "false").lower() not in ("false", "0")


def dry_run(query: Mapping[str, str]) -> bool:
    value = query.get("dryRun", "")
    if value not in ("", "All"):
        raise bad_request(f'Invalid value: "{value}": dryRun: supported values: "All"')
    return value == "All"


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "") or "0"
    try:
        return max(0, int(text))
    except ValueError as error:
        raise bad_request(f"{name}={text!r}: must be a number") from error


def write_continue(revision: int, after: str) -> str:
    """The token with which the next page is asked for: from behind key `after`, as it was at `revision`."""
    return base64.urlsafe_b64encode(msgspec.json.encode({"v": "meta.k8s.io/v1", "rv": revision, "start": after})).decode()


def parse_continue(token: str) -> tuple[int, str]:
    try:
        document = msgspec.json.decode(base64.urlsafe_b64decode(token + "=="), type=dict[str, Any])
        return int(document["rv"]), str(document["start"])
    except (binascii.Error, msgspec.DecodeError, KeyError, ValueError) as error:
        raise bad_request(f"continue key is not valid: {token!r}") from error


def page_expired() -> StatusError:
    """410 for a page whose revision is gone."""
    return expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list"
        " without the continue parameter."
    )


STREAMED = frozenset({"log", "exec"})
"""Subresources whose answers are no API objects: nothing to negotiate."""


class Answer(NamedTuple):
    """How to write a response: the form of its objects and the media type."""

    form: Form
    media: str = JSON


def negotiate(accept: str, query: Mapping[str, str]) -> Answer:
    """The first media type of the Accept header that can be served. Protobuf is not: clients always name JSON as well."""
    for part in (accept or "*/*").split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        options = dict(p.split("=", 1) for p in parameters if "=" in p)
        if media in ("*/*", "application/*", JSON, YAML):
            form = _form(options, query)
            if form is not None:
                return Answer(form, YAML if media == YAML else JSON)
    raise not_acceptable(f"{JSON}, {YAML}")


def _form(options: Mapping[str, str], query: Mapping[str, str]) -> Form | None:
    shape = options.get("as", "")
    if not shape:
        return Form()
    if options.get("g") != "meta.k8s.io" or options.get("v") != "v1":
        return None
    if shape == "Table":
        return Form("table", query.get("includeObject") or "Metadata")
    return Form("metadata") if shape in ("PartialObjectMetadata", "PartialObjectMetadataList") else None


def decode_text(body: bytes, media: str) -> Json:
    """A JSON or YAML request body. Raises StatusError 400 or 415; an empty body is an empty document."""
    if not body:
        return {}
    try:
        if media in ("", JSON) or media.endswith("+json"):
            document = msgspec.json.decode(body)
        elif media in (YAML, "application/x-yaml", "text/yaml") or media.endswith("+yaml"):
            document = yaml.load(body, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        else:
            raise unsupported_media_type(media, f"{JSON}, {YAML}, {PROTOBUF}")
    except (msgspec.DecodeError, yaml.YAMLError) as error:
        raise bad_request(f"the object provided is unrecognized (must be of type Json or Yaml): {error}") from error
    if not isinstance(document, dict):
        raise bad_request("the object provided is unrecognized: it is no object")
    return document
