"""The watch verb: a change stream of JSON lines, resumable, with bookmarks and the initial events of WatchList."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from aiohttp import web

from podwire.apiserver import status
from podwire.apiserver.hub import Form, Hub, Interest, Watcher, event_line
from podwire.apiserver.kinds.base import Kind
from podwire.apiserver.request import ListOptions
from podwire.apiserver.storage import encode

INITIAL_EVENTS_END = "k8s.io/initial-events-end"

DEFAULT_TIMEOUT = 1800.0
"""Seconds that a watch lasts if its client did not say; up to twice that, so that clients do not all come back at once."""

FUTURE_SECONDS = 3.0
"""How long to wait for a resourceVersion that is not there yet."""


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What one client watches."""

    kind: Kind
    interest: Interest
    options: ListOptions
    bookmark_seconds: float = 60.0


async def serve_watch(request: web.Request, hub: Hub, wanted: WatchRequest) -> web.StreamResponse:
    """Streams until the time-out, the client's or the server's end. Raises StatusError for what cannot be watched at all."""
    start = await _start(hub, wanted)
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    if isinstance(start, status.StatusError):
        # Found out too late for clients that read only the stream: kube-apiserver says it in the stream as well.
        await response.write(event_line("ERROR", encode(start.document())))
        return response
    watcher = start
    try:
        await _stream(response, hub, wanted, watcher)
    except ConnectionError:
        pass  # the client went away
    finally:
        hub.shelf(wanted.kind).unwatch(wanted.kind, wanted.interest, watcher)
    return response


async def _start(hub: Hub, wanted: WatchRequest) -> Watcher | status.StatusError:
    """Register the watcher. Nothing is awaited between looking at the state and registering: no event falls in between."""
    options = wanted.options
    _check(options)
    shelf = hub.shelf(wanted.kind)
    if options.initial_events or (options.initial_events is None and options.resource_version in ("", "0")):
        await wait_for_version(hub, options.resource_version)
        watcher = shelf.watch(wanted.kind, wanted.interest, None)
        if options.initial_events and options.bookmarks:
            watcher.put(_bookmark(wanted, hub.revision, initial_end=True))
        return watcher
    if options.resource_version in ("", "0"):
        revision = await hub.up_to_date()
    else:
        await wait_for_version(hub, options.resource_version)
        revision = int(options.resource_version)
    if revision < hub.oldest:
        return status.expired(f"too old resource version: {revision} ({hub.oldest})")
    return shelf.watch(wanted.kind, wanted.interest, revision)


def _check(options: ListOptions) -> None:
    if options.initial_events is None and options.match:
        raise status.invalid_options("resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided")
    if options.initial_events is not None and options.match != "NotOlderThan":
        raise status.invalid_options(
            "sendInitialEvents: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        )


async def wait_for_version(hub: Hub, version: str) -> None:
    """Until the hub is not older than `version` ("": than now; "0": as it is). Raises StatusError 504 if that does not come."""
    if version == "0":
        return
    if not version:
        await hub.up_to_date()
        return
    try:
        async with asyncio.timeout(FUTURE_SECONDS if int(version) > hub.revision else None):
            await hub.at_least(int(version))
    except TimeoutError as error:
        raise status.version_too_large(int(version), hub.revision) from error


async def _stream(response: web.StreamResponse, hub: Hub, wanted: WatchRequest, watcher: Watcher) -> None:
    loop = asyncio.get_running_loop()
    seconds = float(wanted.options.timeout_seconds) or DEFAULT_TIMEOUT * (1 + random.random())
    end = loop.time() + seconds
    for deadline in _deadlines(loop.time(), end, wanted):
        while data := await watcher.take(deadline):
            await response.write(data)
        if watcher.ended:
            return
        if wanted.options.bookmarks:
            await response.write(_bookmark(wanted, hub.revision))
    await response.write_eof()


def _deadlines(start: float, end: float, wanted: WatchRequest) -> Iterator[float]:
    """When bookmarks are due; the last is the end, so that the client resumes from what it has seen."""
    deadline = start + wanted.bookmark_seconds
    while wanted.options.bookmarks and deadline < end:
        yield deadline
        deadline += wanted.bookmark_seconds
    yield end


def _bookmark(wanted: WatchRequest, revision: int, *, initial_end: bool = False) -> bytes:
    meta: dict[str, object] = {"resourceVersion": str(revision)}
    if initial_end:
        meta["annotations"] = {INITIAL_EVENTS_END: "true"}
    resource, shape = wanted.kind.resource, wanted.interest.form.shape
    api_version, kind = resource.api_version, resource.kind
    if shape == "metadata":
        api_version, kind = "meta.k8s.io/v1", "PartialObjectMetadata"
    document: dict[str, object] = {"kind": kind, "apiVersion": api_version, "metadata": {**meta, "creationTimestamp": None}}
    if shape == "table":
        row = {"cells": [], "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta}}
        document = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta, "columnDefinitions": [], "rows": [row]}
    return event_line("BOOKMARK", msgspec.json.encode(document))


__all__ = ["Form", "WatchRequest", "serve_watch", "wait_for_version"]
