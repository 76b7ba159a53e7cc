"""The patch verb: reads the body, and makes the edit that it stands for."""

from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from podwire.apiserver import status
from podwire.apiserver.objects import Objects
from podwire.apiserver.patch import APPLY_PATCH, CONTENT_TYPES, PatchFailed, patched
from podwire.apiserver.request import dry_run
from podwire.apiserver.verbs import Call, fit_object, read_body, respond
from podwire.model.meta import Json

Change = Callable[[Json], Json]


async def patch(call: Call, objects: Objects) -> web.StreamResponse:
    """PATCH of an object or of its status."""
    change = await read_change(call, call.kind.message)
    warnings: list[str] = []

    def edit(old: Json) -> Json:
        fitted, found = fit_object(call, change(old))
        warnings[:] = found
        return fitted

    changed = await objects.update(call.place, edit, subresource=call.target.subresource, dry_run=dry_run(call.query))
    return respond(call, changed, warnings=warnings + call.kind.warnings(changed))


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
