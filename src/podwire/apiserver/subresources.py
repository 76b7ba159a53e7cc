"""Subresources that are served from the store: status, scale, finalize, binding, eviction, serviceaccounts/token."""

from collections.abc import Awaitable, Callable
from datetime import timedelta

from aiohttp import web

from podwire.apiserver import status
from podwire.apiserver.auth import Authenticator
from podwire.apiserver.patching import patch, read_change
from podwire.apiserver.validation import Path, invalid, required
from podwire.apiserver.verbs import Call, Verbs, delete_options, read_document, respond, write
from podwire.model.meta import Json
from podwire.model.timestamps import format_time

Serve = Callable[[Call], Awaitable[web.StreamResponse]]

TOKEN_SECONDS = 3600
"""Life of a service-account token whose request does not say."""


class Subresources:
    """By (name, method). What is not here is unknown or not allowed."""

    def __init__(self, verbs: Verbs, authenticator: Authenticator) -> None:
        self._verbs, self._authenticator = verbs, authenticator
        self.served: dict[tuple[str, str], Serve] = {
            ("status", "GET"): verbs.get,
            ("status", "PUT"): verbs.update,
            ("status", "PATCH"): self.patch,
            ("finalize", "PUT"): self.finalize,
            ("scale", "GET"): self.get_scale,
            ("scale", "PUT"): self.put_scale,
            ("scale", "PATCH"): self.patch_scale,
            ("binding", "POST"): self.bind,
            ("eviction", "POST"): self.evict,
            ("token", "POST"): self.token,
        }

    async def patch(self, call: Call) -> web.StreamResponse:
        return await patch(call, self._verbs)

    # --- namespaces

    async def finalize(self, call: Call) -> web.StreamResponse:
        """Replaces spec.finalizers of a namespace: the last one gone, a namespace that is being deleted goes."""
        body = await read_document(call.request)
        wanted = (body.get("spec") or {}).get("finalizers") or []
        version = body.get("metadata", {}).get("resourceVersion")

        def edit(old: Json) -> Json:
            old["spec"] = {**(old.get("spec") or {}), "finalizers": wanted}
            if version:
                old["metadata"]["resourceVersion"] = version
            return old

        return respond(call, await self._verbs.change(call, edit))

    # --- scale

    async def get_scale(self, call: Call) -> web.StreamResponse:
        return write(call, call.kind.scale_of(await self._verbs.objects.read(call.place)))

    async def put_scale(self, call: Call) -> web.StreamResponse:
        scale = await read_document(call.request, "autoscaling/v1", "Scale")
        return await self._scale(call, lambda old: scale)

    async def patch_scale(self, call: Call) -> web.StreamResponse:
        change = await read_change(call, "k8s.io.api.autoscaling.v1.Scale")
        return await self._scale(call, lambda old: change(call.kind.scale_of(old)))

    async def _scale(self, call: Call, scale_of: Callable[[Json], Json]) -> web.StreamResponse:
        def edit(old: Json) -> Json:
            scale = scale_of(old)
            replicas = (scale.get("spec") or {}).get("replicas", 0)
            if not isinstance(replicas, int) or replicas < 0:
                where = Path() / "spec" / "replicas"
                error = invalid(where, replicas, "must be greater than or equal to 0")
                raise status.invalid(call.kind.resource, call.target.name, [error])
            new = call.kind.with_replicas(old, replicas)
            version = scale.get("metadata", {}).get("resourceVersion")
            return {**new, "metadata": {**new["metadata"], **({"resourceVersion": version} if version else {})}}

        changed = await self._verbs.change(call, edit)
        return write(call, call.kind.scale_of(changed))

    # --- pods

    async def bind(self, call: Call) -> web.StreamResponse:
        """Gives a pod its node."""
        binding = await read_document(call.request, "v1", "Binding")
        target = binding.get("target") or {}
        node, meta = target.get("name", ""), binding.get("metadata") or {}
        if not node:
            raise status.invalid(call.kind.resource, call.target.name, [required(Path() / "target" / "name")])
        if target.get("kind", "Node") not in ("", "Node"):
            raise status.bad_request(f"a pod can be bound to a Node only, not to a {target['kind']}")
        now = format_time(call.now)

        def edit(old: Json) -> Json:
            if meta.get("uid") and meta["uid"] != old["metadata"]["uid"]:
                raise status.conflict(call.kind.resource, call.target.name, "the pod's UID is another one than the binding's")
            return bound(call, old, node, now)

        await self._verbs.change(call, edit)
        return write(call, {**status.success({}), "code": 201}, 201)

    async def evict(self, call: Call) -> web.StreamResponse:
        """A deletion by another name (there are no disruption budgets)."""
        eviction = await read_document(call.request, "policy/v1", "Eviction")
        await self._verbs.objects.delete(call.place, delete_options(eviction.get("deleteOptions") or {}, call.query))
        return write(call, {**status.success({}), "code": 201}, 201)

    # --- service accounts

    async def token(self, call: Call) -> web.StreamResponse:
        """TokenRequest: a signed token that this server takes."""
        await self._verbs.objects.read(call.place)
        request = await read_document(call.request, "authentication.k8s.io/v1", "TokenRequest")
        spec = request.get("spec") or {}
        lifetime = timedelta(seconds=max(600, int(spec.get("expirationSeconds") or TOKEN_SECONDS)))
        audiences = tuple(spec.get("audiences") or ())
        signed = self._authenticator.sign(call.target.namespace, call.target.name, audiences, lifetime, call.now)
        answer = {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": call.target.name, "namespace": call.target.namespace},
            "spec": spec,
            "status": {"token": signed, "expirationTimestamp": format_time(call.now + lifetime)},
        }
        return write(call, answer, 201)


def bound(call: Call, pod: Json, node: str, now: str) -> Json:
    """`pod` assigned to `node`, with the condition that says so. Raises StatusError 409 if it has a node or is going."""
    spec = pod["spec"]
    if "deletionTimestamp" in pod["metadata"]:
        why = f"pod {call.target.name} is being deleted, cannot be assigned to a host"
        raise status.conflict(call.kind.resource, call.target.name, why)
    if spec.get("nodeName"):
        why = f'pod {call.target.name} is already assigned to node "{spec["nodeName"]}"'
        raise status.conflict(call.kind.resource, call.target.name, why)
    spec["nodeName"] = node
    conditions = [c for c in (pod.get("status") or {}).get("conditions") or () if c.get("type") != "PodScheduled"]
    scheduled = {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": now}
    pod["status"] = {**(pod.get("status") or {}), "conditions": [*conditions, scheduled]}
    return pod
