"""The verbs over HTTP: what a request to a resource does, for every kind alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import yaml
from aiohttp import web

from podwire.apiserver import protobuf, status, tables
from podwire.apiserver.hub import Entry, Form, Hub, Interest
from podwire.apiserver.kinds.base import Kind
from podwire.apiserver.objects import DeleteOptions, Edit, Objects, Place
from podwire.apiserver.request import (
    JSON,
    PROTOBUF,
    YAML,
    Answer,
    ListOptions,
    Target,
    decode_text,
    dry_run,
    flag,
    list_options,
    page_expired,
    write_continue,
)
from podwire.apiserver.schema import api_schema, strict_error
from podwire.apiserver.storage import encode, from_item, key_of, prefix_of
from podwire.apiserver.watch import WatchRequest, serve_watch, wait_for_version
from podwire.model.meta import Json
from podwire.store.port import Compacted, FutureRevision, Store

BODY_LIMIT = 3 * 1024 * 1024
"""Bytes of a request body (kube-apiserver's limit)."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a resource, taken apart."""

    request: web.Request
    target: Target
    answer: Answer
    now: datetime

    @property
    def kind(self) -> Kind:
        return self.target.kind

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query

    @property
    def place(self) -> Place:
        return Place(self.target.kind, self.target.namespace, self.target.name)

    @property
    def manager(self) -> str:
        """Who writes, for metadata.managedFields: the client says so, or its User-Agent does."""
        return self.query.get("fieldManager") or self.request.headers.get("User-Agent", "").partition("/")[0]


class Verbs:
    """get, list, watch, create, update, delete and deletecollection. Patches and subresources are built on these."""

    def __init__(self, store: Store, hub: Hub, objects: Objects, bookmark_seconds: float) -> None:
        self.store, self.hub, self.objects = store, hub, objects
        self._bookmark_seconds = bookmark_seconds

    # --- reading

    async def get(self, call: Call) -> web.StreamResponse:
        if flag(call.query, "watch"):
            return await self.watch(call)
        await wait_for_version(self.hub, call.query.get("resourceVersion", ""))
        entry = self.hub.shelf(call.kind).get(key_of(call.kind.storage, call.target.namespace, call.target.name))
        if entry is None:
            raise status.not_found(call.kind.resource, call.target.name)
        if call.answer == Answer(Form()):
            return web.Response(body=entry.raw_in(call.kind), content_type=JSON)
        return respond(call, entry.document(call.kind))

    async def list(self, call: Call) -> web.StreamResponse:
        options = list_options(call.kind, call.query)
        if options.watch:
            return await self.watch(call)
        if options.at or options.match == "Exact":
            return await self._list_past(call, options)
        await wait_for_version(self.hub, options.resource_version)
        interest = Interest(call.target.namespace, options.labels, options.fields, call.answer.form)
        entries = list(self.hub.shelf(call.kind).select(call.kind, interest))
        meta: Json = {"resourceVersion": str(self.hub.revision)}
        if options.limit and len(entries) > options.limit:
            meta["continue"] = write_continue(self.hub.revision, entries[options.limit - 1].key)
            meta["remainingItemCount"] = len(entries) - options.limit
            entries = entries[: options.limit]
        if call.answer != Answer(Form()):
            return respond_list(call, [entry.document(call.kind) for entry in entries], meta)
        return web.Response(body=_join_list(call.kind, entries, meta), content_type=JSON)

    async def _list_past(self, call: Call, options: ListOptions) -> web.Response:
        """A further page, or a list at an exact revision: from the store's history."""
        revision = options.at or int(options.resource_version)
        prefix = prefix_of(call.kind.storage, call.target.namespace)
        found: list[Json] = []
        after, more = options.after, True
        while more and not (options.limit and len(found) == options.limit):
            want = options.limit - len(found) if options.limit else 0
            try:
                page = await self.store.list(prefix, limit=want, start_after=after, revision=revision)
            except Compacted as error:
                raise page_expired() from error
            except FutureRevision as error:
                raise status.version_too_large(error.wanted, error.current) from error
            revision, more = page.revision, page.more
            for item in page.items:
                after, obj = item.key, from_item(call.kind, item)
                if _selected(call.kind, options, obj):
                    found.append(obj)
        meta: Json = {"resourceVersion": str(revision)}
        if more:
            meta["continue"] = write_continue(revision, after)
        return respond_list(call, found, meta)

    async def watch(self, call: Call) -> web.StreamResponse:
        options = list_options(call.kind, call.query, call.target.name)
        interest = Interest(call.target.namespace, options.labels, options.fields, call.answer.form)
        wanted = WatchRequest(call.kind, interest, options, self._bookmark_seconds)
        return await serve_watch(call.request, self.hub, wanted)

    # --- writing

    async def create(self, call: Call) -> web.Response:
        obj, warnings = await read_object(call)
        namespace = namespace_for(call, obj)
        made = await self.objects.create(call.kind, namespace, obj, dry_run=dry_run(call.query))
        return respond(call, made, 201, warnings + call.kind.warnings(made))

    async def update(self, call: Call) -> web.Response:
        obj, warnings = await read_object(call)
        namespace_for(call, obj)
        name = obj.get("metadata", {}).get("name", "")
        if name != call.target.name:
            raise status.bad_request(f"the name of the object ({name}) does not match the name on the URL ({call.target.name})")
        body = msgspec.json.encode(obj)
        changed = await self.change(call, lambda old: decode_text(body, JSON))
        return respond(call, changed, warnings=warnings + call.kind.warnings(changed))

    async def change(self, call: Call, edit: Edit, subresource: str | None = None) -> Json:
        """An update of the object that the call names, with the options of its query."""
        sub = call.target.subresource if subresource is None else subresource
        return await self.objects.update(call.place, edit, subresource=sub, dry_run=dry_run(call.query), manager=call.manager)

    async def delete(self, call: Call) -> web.Response:
        options = await read_delete_options(call)
        obj, gone = await self.objects.delete(call.place, options)
        if not gone:
            return respond(call, obj, 200)
        resource, meta = call.kind.resource, obj["metadata"]
        details = {"name": meta["name"], "group": resource.group, "kind": resource.plural, "uid": meta["uid"]}
        return web.json_response(status.success({key: value for key, value in details.items() if value}))

    async def delete_collection(self, call: Call) -> web.Response:
        options = list_options(call.kind, call.query)
        how = await read_delete_options(call)
        await self.hub.up_to_date()
        interest = Interest(call.target.namespace, options.labels, options.fields)
        removed = []
        for entry in list(self.hub.shelf(call.kind).select(call.kind, interest)):
            try:
                obj, _ = await self.objects.delete(Place(call.kind, entry.namespace, entry.name), how)
            except status.StatusError as error:
                if error.code != 404:
                    raise
                continue
            removed.append(obj)
        return respond_list(call, removed, {"resourceVersion": str(self.hub.revision)})


# --- bodies ---------------------------------------------------------------------------------------------------------


async def read_body(request: web.Request) -> bytes:
    """Raises StatusError 413."""
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise status.too_large(BODY_LIMIT) from error


async def read_document(request: web.Request, api_version: str = "", kind: str = "") -> Json:
    """The body, whatever it is written in. A document that does not say what it is counts as `api_version` `kind`."""
    body = await read_body(request)
    if request.content_type == PROTOBUF:
        document = protobuf.decode(body, api_version, kind)
    else:
        document = decode_text(body, request.headers.get("Content-Type", "").partition(";")[0].strip())
    return document


async def read_object(call: Call) -> tuple[Json, list[str]]:
    """The object in the body, made to fit its kind, and warnings about fields that nobody knows."""
    resource = call.kind.resource
    obj = await read_document(call.request, resource.api_version, resource.kind)
    return fit_object(call, obj)


def fit_object(call: Call, obj: Json) -> tuple[Json, list[str]]:
    """Raises StatusError 400 for another kind's object, or (fieldValidation=Strict) for unknown fields."""
    resource = call.kind.resource
    given = (obj.get("apiVersion") or resource.api_version, obj.get("kind") or resource.kind)
    if given[0] != resource.api_version:
        raise status.bad_request(
            f"the API version in the data ({given[0]}) does not match the expected API version ({resource.api_version})"
        )
    if given[1] != resource.kind:
        raise status.bad_request(f"the kind in the data ({given[1]}) does not match the expected kind ({resource.kind})")
    fitted = api_schema().fit({**obj, "apiVersion": given[0], "kind": given[1]}, call.kind.message)
    validation = call.query.get("fieldValidation", "") or "Warn"
    if fitted.unknown and validation == "Strict":
        raise status.bad_request(
            f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '
            + strict_error(fitted.unknown)
        )
    warnings = [f'unknown field "{path}"' for path in fitted.unknown] if validation == "Warn" else []
    return fitted.document, warnings


def namespace_for(call: Call, obj: Json) -> str:
    """The request's namespace, which the object must agree with."""
    namespace = call.target.namespace
    given = obj.get("metadata", {}).get("namespace", "")
    if call.kind.resource.namespaced and given and namespace and given != namespace:
        raise status.bad_request("the namespace of the provided object does not match the namespace sent on the request")
    if call.kind.resource.namespaced and not namespace:
        raise status.bad_request("an empty namespace may not be set during creation")
    return namespace


async def read_delete_options(call: Call) -> DeleteOptions:
    """From the body and, over it, the query."""
    body = await read_document(call.request, "v1", "DeleteOptions") if call.request.can_read_body else {}
    return delete_options(body, call.query)


def delete_options(body: Json, query: Mapping[str, str]) -> DeleteOptions:
    """Raises StatusError 400."""
    grace: Any = query.get("gracePeriodSeconds", body.get("gracePeriodSeconds"))
    preconditions = body.get("preconditions") or {}
    propagation = query.get("propagationPolicy") or body.get("propagationPolicy") or ""
    if not propagation and body.get("orphanDependents") is True:
        propagation = "Orphan"
    if propagation not in ("", "Background", "Foreground", "Orphan"):
        raise status.bad_request(f"invalid propagationPolicy {propagation!r}: must be Background, Foreground or Orphan")
    try:
        seconds = None if grace is None else int(grace)
    except ValueError as error:
        raise status.bad_request(f"invalid gracePeriodSeconds {grace!r}: must be a number") from error
    return DeleteOptions(
        grace_seconds=seconds,
        uid=preconditions.get("uid", ""),
        resource_version=preconditions.get("resourceVersion", ""),
        propagation=propagation,
        dry_run=dry_run(query) or body.get("dryRun") == ["All"],
    )


# --- answers --------------------------------------------------------------------------------------------------------


def _selected(kind: Kind, options: ListOptions, obj: Json) -> bool:
    return options.labels.matches(obj["metadata"].get("labels") or {}) and (
        not options.fields.terms or options.fields.matches(kind.selectable_fields(obj))
    )


def _join_list(kind: Kind, entries: list[Entry], meta: Json) -> bytes:
    """A list out of objects that are encoded already."""
    resource = kind.resource
    head = f'{{"kind":"{resource.kind}List","apiVersion":"{resource.api_version}","metadata":'.encode()
    return head + encode(meta) + b',"items":[' + b",".join(entry.raw_in(kind) for entry in entries) + b"]}"


def respond(call: Call, obj: Json, code: int = 200, warnings: list[str] | None = None) -> web.Response:
    """One object in the form that was asked for."""
    form = call.answer.form
    if form.shape == "table":
        meta = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
        obj = tables.table(call.kind, [obj], meta, call.now, include=form.include)
    elif form.shape == "metadata":
        obj = tables.partial_metadata(obj)
    return write(call, obj, code, warnings)


def respond_list(call: Call, objs: list[Json], meta: Json) -> web.Response:
    form, resource = call.answer.form, call.kind.resource
    if form.shape == "table":
        return write(call, tables.table(call.kind, objs, meta, call.now, include=form.include))
    if form.shape == "metadata":
        return write(call, tables.partial_metadata_list(objs, meta))
    return write(call, {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": meta, "items": objs})


def write(call: Call, document: Json, code: int = 200, warnings: list[str] | None = None) -> web.Response:
    """A document as JSON or YAML, with Warning headers (RFC 7234 code 299)."""
    if call.answer.media == YAML:
        response = web.Response(text=yaml.safe_dump(document, sort_keys=False), status=code, content_type=YAML)
    else:
        response = web.Response(body=encode(document), status=code, content_type=JSON)
    for text in warnings or ():
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        response.headers.add("Warning", f'299 - "{quoted}"')
    return response
