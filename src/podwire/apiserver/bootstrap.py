"""What a cluster has from the start: its first namespaces, and the Service by which pods find the API server."""

from podwire.apiserver.config import ServerConfig
from podwire.apiserver.kinds import REGISTRY, Kind
from podwire.apiserver.objects import Objects, Place
from podwire.apiserver.status import StatusError
from podwire.model.meta import Json
from podwire.model.resources import ENDPOINTSLICES, NAMESPACES, SERVICES, Resource

SYSTEM_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")


async def bootstrap(objects: Objects, config: ServerConfig) -> None:
    """Make what is missing; bring the API server's own endpoints up to date."""
    for name in SYSTEM_NAMESPACES:
        await _ensure(objects, NAMESPACES, "", {"metadata": {"name": name}})
    if not config.service_cidrs:
        return
    await _ensure(objects, SERVICES, "default", _service(config))
    if _advertised(config):
        await _put(objects, ENDPOINTSLICES, "default", _endpoints(config))


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


def _endpoints(config: ServerConfig) -> Json:
    return {
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": f"IPv{config.service_cidrs[0].version}",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in _advertised(config)],
        "ports": [{"name": "https", "port": config.advertise_port, "protocol": "TCP"}],
    }


def _advertised(config: ServerConfig) -> list[str]:
    """The server's addresses in the Service's (primary) family."""
    return [str(address) for address in config.advertise if address.version == config.service_cidrs[0].version]


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


async def _put(objects: Objects, resource: Resource, namespace: str, obj: Json) -> None:
    if not await _ensure(objects, resource, namespace, {**obj, "metadata": dict(obj["metadata"])}):
        place = Place(_kind(resource), namespace, obj["metadata"]["name"])
        own = {key: value for key, value in obj.items() if key != "metadata"}
        await objects.update(place, lambda old: {**old, **own})


def _kind(resource: Resource) -> Kind:
    kind = REGISTRY.by_kind(resource.api_version, resource.kind)
    assert kind is not None
    return kind
