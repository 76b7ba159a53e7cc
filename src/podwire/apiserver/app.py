"""The API server as an aiohttp application: routes, authentication, errors as metav1.Status. Composition of this package."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from podwire.apiserver import discovery, status
from podwire.apiserver.allocation import ServiceAllocator, ServiceRanges
from podwire.apiserver.auth import ADMIN, ANONYMOUS, Authenticator, User, certificate_user
from podwire.apiserver.bootstrap import bootstrap
from podwire.apiserver.claims import ServiceClaims, ledgers, repair_claims
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.housekeeping import keep_house
from podwire.apiserver.hub import Hub
from podwire.apiserver.joining import CA_PATH, JOIN_PATH, RENEW_PATH, Joining
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.noderules import NodeRules
from podwire.apiserver.objects import Objects
from podwire.apiserver.openapi import OpenApi
from podwire.apiserver.patching import patch
from podwire.apiserver.presence import keep_presence
from podwire.apiserver.proxy import NodeProxy
from podwire.apiserver.request import STREAMED, Target, negotiate, parse_path
from podwire.apiserver.reviews import review
from podwire.apiserver.storage import encode
from podwire.apiserver.subresources import Serve, Subresources
from podwire.apiserver.verbs import BODY_LIMIT, Call, Verbs, read_document
from podwire.model.errors import InvalidInput
from podwire.store.port import Store, StoreError

_log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz", "/livez", "/readyz", "/version", CA_PATH})
"""Readable without a token, as in Kubernetes (system:public-info-viewer)."""

EMPTY_SWAGGER = b"\x0a\x032.0\x12\x0d\x0a\x07podwire\x12\x02v1"
"""openapi.v2.Document in protobuf: swagger (field 1) and info (field 2: title, version)."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """One API server's parts and its request handlers."""

    def __init__(self, store: Store, config: ServerConfig) -> None:
        self._store, self._config = store, config
        ranges = ServiceRanges(config.service_cidrs, config.node_ports)
        allocator = ServiceAllocator(ranges, config.choose)
        self.hub = Hub(store, REGISTRY, config.now, ledgers(allocator))
        claims = ServiceClaims(allocator, self.hub.up_to_date, config.now)
        self.objects = Objects(store, config.now, {"services": claims})
        self._verbs = Verbs(store, self.hub, self.objects, config.bookmark_seconds)
        self._authenticator = Authenticator(config.tokens, config.signing_key)
        self._proxy = NodeProxy(self.objects, config.kubelet)
        self._subresources: dict[tuple[str, str], Serve] = {
            **Subresources(self._verbs, self._authenticator).served,
            ("log", "GET"): self._proxy.log,
            ("exec", "GET"): self._proxy.exec,
            ("exec", "POST"): self._proxy.exec,
        }
        self._openapi = OpenApi(REGISTRY)
        self._rules = NodeRules(self.hub)
        self.joining = None if config.authority is None else Joining(self.hub, config, config.authority)
        self._ready = False

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Everything that runs beside the requests (an aiohttp cleanup context)."""
        await repair_claims(self._store, self._config.now())
        following = asyncio.create_task(self.hub.run(), name="api server: follow the store")
        tasks = [following]
        try:
            await self.hub.up_to_date()
            await bootstrap(self.objects, self._config)
            tasks.append(asyncio.create_task(keep_house(self._store, self.hub, self._config), name="api server: housekeeping"))
            if self._config.identity:
                presence = keep_presence(self.objects, self.hub, self._config)
                tasks.append(asyncio.create_task(presence, name="api server: presence"))
            self._ready = True
            yield
        finally:
            self._ready = False
            for task in reversed(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._proxy.close()

    async def end_watches(self, app: web.Application) -> None:
        """Lets the streams finish, so that a stop does not wait for them."""
        self.hub.end_watches()

    # --- what every request passes

    async def authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Middleware: nobody without a known token gets past here, but to OPEN_PATHS."""
        if self._config.tokens and request.path not in OPEN_PATHS:
            self.user_of(request)
        return await handler(request)

    def user_of(self, request: web.Request) -> User:
        """Raises StatusError 401."""
        if not self._config.tokens:
            return ADMIN
        authorization, now = request.headers.get("Authorization", ""), self._config.now()
        if self.joining is not None:
            known = self.joining.bootstrap_user(authorization, now) if authorization else None
            known = known or (None if authorization else certificate_user(request.get_extra_info("peercert")))
            if known is not None:
                return known
        user = self._authenticator.user(authorization, now)
        if user is ANONYMOUS:
            raise status.unauthorized()
        return user

    async def _authorize(self, request: web.Request, target: Target) -> None:
        """Raises StatusError 403."""
        if self.joining is None:
            return  # no nodes with certificates, no users that may not do everything
        user = self.user_of(request)
        if not self._rules.restricted(user):
            return
        body = await read_document(request) if request.method == "POST" else None
        self._rules.check(user, target, request.method, request.query, body)

    # --- handlers

    async def resource(self, request: web.Request) -> web.StreamResponse:
        """/api/… and /apis/…: discovery, or a verb on a resource."""
        target = parse_path(request.path)
        if target is None:
            return await self._review(request) if request.method == "POST" else self._discovery(request)
        await self._authorize(request, target)
        serve = self._serve(target, request.method)
        accept = "*/*" if target.subresource in STREAMED else request.headers.get("Accept", "")
        return await serve(Call(request, target, negotiate(accept, request.query), self._config.now()))

    def _serve(self, target: Target, method: str) -> Serve:
        if target.subresource:
            served = self._subresources.get((target.subresource, method))
        elif target.name:
            served = {
                "GET": self._verbs.get,
                "PUT": self._verbs.update,
                "PATCH": self._patch,
                "DELETE": self._verbs.delete,
            }.get(method)
        else:
            served = {
                "GET": self._verbs.list,
                "POST": self._verbs.create,
                "DELETE": self._verbs.delete_collection if "deletecollection" in target.kind.verbs else None,
            }.get(method)
        if served is None:
            raise status.method_not_allowed(target.kind.resource, method)
        return served

    async def _patch(self, call: Call) -> web.StreamResponse:
        return await patch(call, self._verbs)

    async def _review(self, request: web.Request) -> web.Response:
        """Resources that are asked and not stored."""
        _, group, version, *plural = [*request.path.strip("/").split("/"), "", ""]
        virtual = discovery.VIRTUAL.get((group, version), [])
        kind = next((str(entry["kind"]) for entry in virtual if [entry["name"]] == plural[:1]), "")
        if not kind:
            raise status.unknown_path(request.method, request.path)
        asked = await read_document(request, f"{group}/{version}", kind)
        result = review(kind, asked, self.user_of(request), self._authenticator, self._config.now())
        answer = {"apiVersion": f"{group}/{version}", "kind": kind, "metadata": {}, "spec": asked.get("spec"), "status": result}
        return web.Response(body=encode(answer), status=201, content_type="application/json")

    def _discovery(self, request: web.Request) -> web.Response:
        parts = request.path.strip("/").split("/")
        if request.method != "GET":
            raise status.unknown_path(request.method, request.path)
        document = None
        if len(parts) == 1 and discovery.wants_aggregated(request.headers.get("Accept", "")):
            document = discovery.aggregated(core=parts[0] == "api")
            media = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
            return web.Response(body=encode(document), headers={"Content-Type": media})
        match parts:
            case ["api"]:
                document = discovery.api_versions([request.host])
            case ["apis"]:
                document = discovery.group_list()
            case ["api", version]:
                document = discovery.resource_list("", version)
            case ["apis", group]:
                document = discovery.group(group)
            case ["apis", group, version]:
                document = discovery.resource_list(group, version)
        if document is None:
            raise status.unknown_path(request.method, request.path)
        return web.Response(body=encode(document), content_type="application/json")

    async def join(self, request: web.Request) -> web.Response:
        assert self.joining is not None
        return await self.joining.join(request, self.user_of(request))

    async def renew(self, request: web.Request) -> web.Response:
        assert self.joining is not None
        return await self.joining.renew(request, self.user_of(request))

    async def version(self, request: web.Request) -> web.Response:
        return web.Response(body=encode(discovery.version(self._config.build)), content_type="application/json")

    async def openapi(self, request: web.Request) -> web.Response:
        """/openapi/v3 and /openapi/v3/<path>; the latter may be kept, its URL carries a hash."""
        path = request.match_info.get("path", "")
        body = self._openapi.document(path) if path else encode(self._openapi.index())
        if body is None:
            raise status.unknown_path(request.method, request.path)
        headers = {"ETag": f'"{self._openapi.etag}"', "Vary": "Accept"}
        if path and request.query.get("hash"):
            headers["Cache-Control"] = "public, immutable"
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def openapi_v2(self, request: web.Request) -> web.Response:
        """/openapi/v2, without content: kubectl asks it about kinds that v3 does not know, and goes on to name them itself."""
        if "protobuf" in request.headers.get("Accept", ""):
            return web.Response(body=EMPTY_SWAGGER, content_type="application/com.github.proto-openapi.spec.v2.v1.0+protobuf")
        document = {"swagger": "2.0", "info": {"title": "podwire", "version": "v1"}, "paths": {}, "definitions": {}}
        return web.Response(body=encode(document), content_type="application/json")

    async def health(self, request: web.Request) -> web.Response:
        """/healthz, /livez and /readyz."""
        if not self._ready:
            raise status.unavailable("the API server is starting or stopping")
        return web.Response(text="ok")


@web.middleware
async def errors_as_status(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: whatever is raised becomes a metav1.Status."""
    try:
        return await handler(request)
    except status.StatusError as error:
        failure = error
    except StoreError as error:
        _log.error("%s %s: the store failed: %s", request.method, request.path, error)
        failure = status.unavailable(str(error))
    except InvalidInput as error:
        failure = status.bad_request(str(error))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        failure = (
            status.unknown_path(request.method, request.path)
            if error.status == 404
            else status.StatusError(error.status, "", error.reason)
        )
    except Exception:
        # The boundary of a request: one that fails in an unforeseen way must not take others with it.
        _log.exception("%s %s failed", request.method, request.path)
        failure = status.internal("an unforeseen error; the API server's log says more")
    return web.Response(body=encode(failure.document()), status=failure.code, content_type="application/json")


def create_app(store: Store, config: ServerConfig) -> web.Application:
    """The API server. It does not own `store`: close that after the application is down. Add routes before it starts."""
    api = Api(store, config)

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await api.authenticate(request, handler)

    app = web.Application(middlewares=[errors_as_status, authenticate], client_max_size=BODY_LIMIT)
    for root in ("/api", "/apis"):
        app.router.add_route("*", root, api.resource)
        app.router.add_route("*", root + "/{path:.*}", api.resource)
    app.router.add_get("/version", api.version)
    app.router.add_get("/openapi/v2", api.openapi_v2)
    app.router.add_get("/openapi/v3", api.openapi)
    app.router.add_get("/openapi/v3/{path:.*}", api.openapi)
    for path in ("/healthz", "/livez", "/readyz"):
        app.router.add_get(path, api.health)
        app.router.add_get(path + "/{check:.*}", api.health)
    if api.joining is not None:
        app.router.add_get(CA_PATH, api.joining.ca)
        app.router.add_post(JOIN_PATH, api.join)
        app.router.add_post(RENEW_PATH, api.renew)
    app.cleanup_ctx.append(api.run)
    app.on_shutdown.append(api.end_watches)
    return app
