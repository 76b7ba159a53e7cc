"""The patch verb: reads the body, and makes the edit that it stands for."""

from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from podwire.apiserver import status
from podwire.apiserver.apply import ApplyConflict, Manager, apply
from podwire.apiserver.patch import APPLY_PATCH, CONTENT_TYPES, PatchFailed, patched
from podwire.apiserver.request import YAML, decode_text, dry_run, flag
from podwire.apiserver.verbs import Call, Verbs, fit_object, namespace_for, read_body, respond
from podwire.model.meta import Json
from podwire.model.timestamps import format_time

Change = Callable[[Json], Json]


async def patch(call: Call, verbs: Verbs) -> web.StreamResponse:
    """PATCH of an object or of its status."""
    if call.request.content_type == APPLY_PATCH:
        return await _apply(call, verbs)
    change = await read_change(call, call.kind.message)
    warnings: list[str] = []

    def edit(old: Json) -> Json:
        fitted, found = fit_object(call, change(old))
        warnings[:] = found
        return fitted

    changed = await verbs.change(call, edit)
    return respond(call, changed, warnings=warnings + call.kind.warnings(changed))


async def _apply(call: Call, verbs: Verbs) -> web.StreamResponse:
    """Server-side apply: makes the object where it is not there."""
    name = call.query.get("fieldManager", "")
    if not name:
        raise status.bad_request(
            "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value: is required for apply patch"
        )
    config, warnings = fit_object(call, decode_text(await read_body(call.request), YAML))
    config.setdefault("metadata", {}).setdefault("name", call.target.name)
    namespace = namespace_for(call, config)
    manager = Manager(name, call.kind.resource.api_version, "Apply", call.target.subresource)
    force, dry, now = flag(call.query, "force"), dry_run(call.query), format_time(call.now)

    def applied(live: Json | None) -> Json:
        try:
            return apply(live, config, call.kind.message, manager, now, force=force)
        except ApplyConflict as error:
            raise _conflict(call, error) from error

    code = 200
    try:
        made = await verbs.objects.update(call.place, applied, subresource=call.target.subresource, dry_run=dry, manager=None)
    except status.StatusError as error:
        if error.code != 404 or call.target.subresource:
            raise
        made, code = await verbs.objects.create(call.kind, namespace, applied(None), dry_run=dry), 201
    return respond(call, made, code, warnings + call.kind.warnings(made))


def _conflict(call: Call, error: ApplyConflict) -> status.StatusError:
    causes = [{"reason": c.reason, "message": c.message, "field": c.field} for c in error.causes]
    details = status.details_of(call.kind.resource, call.target.name) | {"causes": causes}
    return status.StatusError(409, "Conflict", str(error), details)


async def read_change(call: Call, message: str) -> Change:
    """The patch in the body as a function of documents of type `message`. Raises StatusError 400 or 415."""
    media = call.request.content_type
    if media not in CONTENT_TYPES or media == APPLY_PATCH:
        raise status.unsupported_media_type(media, ", ".join(CONTENT_TYPES))
    body = await read_body(call.request)
    try:
        decoded: Any = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise status.bad_request(f"error decoding patch: {error}") from error
    return lambda old: apply_change(call, media, old, decoded, message)


def apply_change(call: Call, media: str, old: Json, decoded: Any, message: str) -> Json:
    try:
        new = patched(media, old, decoded, message)
    except PatchFailed as error:
        if error.code == 400:
            raise status.bad_request(str(error)) from error
        raise status.StatusError(
            422, "Invalid", f"the server rejected our request due to an error in our request: {error}"
        ) from error
    if not isinstance(new, dict):
        raise status.bad_request("the patch leaves no object")
    return new
