"""The subnet manager "kube" out of the options of `podwire agent`, and what is told to the API server."""

import asyncio
import logging
import os
import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from podwire.agent.subnets.kube import KubeSubnets
from podwire.cli.agentrun import Managed, Ready, Settings
from podwire.client.api import ApiClient, PatchKind
from podwire.client.errors import ApiError, NotFound
from podwire.client.informer import Informer
from podwire.client.kubeconfig import client_from_kubeconfig, in_cluster_client
from podwire.model.addr import IPAddress
from podwire.model.errors import InvalidInput
from podwire.model.netconf import NetConfig, parse_net_config
from podwire.model.objects import Node
from podwire.model.resources import NODES, PODS
from podwire.model.timestamps import format_time
from podwire.plan.leases import forced_addresses

log = logging.getLogger(__name__)


@asynccontextmanager
async def kube_manager(settings: Settings) -> AsyncIterator[Managed]:
    async with _api_client(settings) as client, asyncio.TaskGroup() as group:
        node = await _node_name(settings, client)
        informer = Informer(client, NODES, Node)
        task = group.create_task(informer.run())
        path, prefix = settings["net_config_path"], settings["kube_annotation_prefix"]
        config = _config(path)
        manager = KubeSubnets(informer, node, config, client=client, prefix=prefix, reread=lambda: _config(path))
        tell = partial(_say_available, client=client, node=node) if settings["set_node_network_unavailable"] else None
        try:
            yield Managed(manager, node, tell, await _public(client, node, prefix))
        finally:
            task.cancel()


def _api_client(settings: Settings) -> ApiClient:
    if settings["kubeconfig_file"]:
        return client_from_kubeconfig(Path(settings["kubeconfig_file"]), user_agent="podwire/agent")
    if settings["kube_api_url"]:
        return ApiClient(settings["kube_api_url"], user_agent="podwire/agent")
    return in_cluster_client(os.environ, user_agent="podwire/agent")


def _config(path: Path) -> NetConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: the network configuration cannot be read ({error}); see --net-config-path") from error
    return parse_net_config(text, source=str(path), leased=False)


async def _public(client: ApiClient, node: str, prefix: str) -> tuple[IPAddress, ...]:
    """The addresses that stand on the Node for it to use; none where it is not there yet."""
    while True:
        try:
            return forced_addresses(msgspec.convert(await client.get(NODES, node), Node), prefix)
        except NotFound:
            return ()
        except ApiError as error:
            log.warning("node %s cannot be read: %s; again in 5 s", node, error)
            await asyncio.sleep(5)


async def _node_name(settings: Settings, client: ApiClient) -> str:
    """As flannel finds it: NODE_NAME, or the node of the pod that this runs in."""
    if settings["node_name"]:
        return str(settings["node_name"])
    pod, namespace = os.environ.get("POD_NAME", ""), os.environ.get("POD_NAMESPACE", "")
    if pod and namespace:
        document = await client.get(PODS, pod, namespace)
        return str(document["spec"]["nodeName"])
    return platform.node()


async def _say_available(ready: Ready, client: ApiClient, node: str) -> None:
    """The scheduler keeps pods away from a Node whose network is said to be unavailable; cloud providers say so at first."""
    await ready()
    now = format_time(datetime.now(UTC))
    condition = {
        "type": "NetworkUnavailable",
        "status": "False",
        "reason": "FlannelIsUp",
        "message": "the overlay is programmed by podwire",
        "lastTransitionTime": now,
        "lastHeartbeatTime": now,
    }
    while True:
        try:
            patch = {"status": {"conditions": [condition]}}
            await client.patch(NODES, node, patch, subresource="status", kind=PatchKind.STRATEGIC)
        except ApiError as error:
            log.warning("node %s: NetworkUnavailable cannot be cleared: %s; again in 5 s", node, error)
            await asyncio.sleep(5)
        else:
            return
