"""What a cluster has from the start: its first namespaces, and the Service by which pods find the API server."""

from collections.abc import Iterable, Sequence

from podwire.apiserver.config import ServerConfig
from podwire.apiserver.kinds import REGISTRY, Kind
from podwire.apiserver.objects import DeleteOptions, Objects, Place
from podwire.apiserver.status import StatusError
from podwire.model.addr import IPAddress
from podwire.model.meta import Json
from podwire.model.resources import ENDPOINTSLICES, NAMESPACES, SERVICECIDRS, SERVICES, Resource

SERVICE = "kubernetes"
"""The name of the Service by which pods find the API server, and of the object that tells the ranges of ClusterIPs."""

SYSTEM_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")


async def bootstrap(objects: Objects, config: ServerConfig) -> None:
    """Make what is missing; bring the API server's own endpoints up to date."""
    for name in SYSTEM_NAMESPACES:
        await _ensure(objects, NAMESPACES, "", {"metadata": {"name": name}})
    if not config.service_cidrs:
        return
    await _publish_ranges(objects, config)
    await _ensure(objects, SERVICES, "default", _service(config))
    if not config.identity:
        await publish(objects, config, config.advertise)


async def publish(objects: Objects, config: ServerConfig, addresses: Iterable[IPAddress]) -> None:
    """Make `addresses`, those in the Service's (primary) family, the endpoints of Service default/kubernetes."""
    version = config.service_cidrs[0].version
    found = sorted((address for address in set(addresses) if address.version == version), key=int)
    if found:
        await put(objects, ENDPOINTSLICES, "default", _endpoints(config, found))


async def _publish_ranges(objects: Objects, config: ServerConfig) -> None:
    """Ranges do not change, so where the server is started with others the object is made anew. It need not wait for the
    addresses in the old ranges: their Services keep them."""
    cidrs = [str(network) for network in config.service_cidrs]
    obj = {"metadata": {"name": SERVICE}, "spec": {"cidrs": cidrs}}
    if await _ensure(objects, SERVICECIDRS, "", obj):
        return
    place = Place(_kind(SERVICECIDRS), "", SERVICE)
    if (await objects.read(place))["spec"]["cidrs"] != cidrs:
        await objects.update(place, lambda old: {**old, "metadata": {**old["metadata"], "finalizers": []}})
        try:
            await objects.delete(place, DeleteOptions())
        except StatusError as error:
            if error.code != 404:
                raise  # not there: its deletion had waited for the finalizer
        await _ensure(objects, SERVICECIDRS, "", obj)


def _service(config: ServerConfig) -> Json:
    network = config.service_cidrs[0]
    return {
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": str(network[1]),
            "ipFamilies": [f"IPv{network.version}"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.advertise_port}],
        },
    }


def _endpoints(config: ServerConfig, addresses: Sequence[IPAddress]) -> Json:
    return {
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": f"IPv{config.service_cidrs[0].version}",
        "endpoints": [{"addresses": [str(address)], "conditions": {"ready": True}} for address in addresses],
        "ports": [{"name": "https", "port": config.advertise_port, "protocol": "TCP"}],
    }


async def _ensure(objects: Objects, resource: Resource, namespace: str, obj: Json) -> bool:
    """Whether it had to be made."""
    kind = _kind(resource)
    try:
        await objects.read(Place(kind, namespace, obj["metadata"]["name"]))
    except StatusError as error:
        if error.code != 404:
            raise
    else:
        return False
    try:
        await objects.create(kind, namespace, obj)
    except StatusError as error:
        if error.reason != "AlreadyExists":
            raise
        return False
    return True


async def put(objects: Objects, resource: Resource, namespace: str, obj: Json) -> None:
    """Make the object, or give the one there is these fields (of its metadata: labels and annotations)."""
    if not await _ensure(objects, resource, namespace, {**obj, "metadata": dict(obj["metadata"])}):
        place = Place(_kind(resource), namespace, obj["metadata"]["name"])
        own = {key: value for key, value in obj.items() if key != "metadata"}
        told = {key: obj["metadata"][key] for key in ("labels", "annotations") if key in obj["metadata"]}
        await objects.update(place, lambda old: {**old, **own, "metadata": {**old["metadata"], **told}})


def _kind(resource: Resource) -> Kind:
    kind = REGISTRY.by_kind(resource.api_version, resource.kind)
    assert kind is not None
    return kind
