"""Puts an overlay agent together out of the options of `podwire agent`, and runs it until a signal."""

import asyncio
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web

from podwire.agent.nodelock import NodeLock
from podwire.agent.overlayd.agent import OverlayAgent, OverlayOptions
from podwire.agent.overlayd.files import read_last_subnets
from podwire.agent.overlayd.host import LinuxHost
from podwire.agent.overlayd.status import status_app
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.agent.subnets.kube import KubeSubnets
from podwire.agent.subnets.port import SubnetManager
from podwire.client.api import ApiClient, PatchKind
from podwire.client.errors import ApiError
from podwire.client.etcd import EtcdClient, etcd_tls
from podwire.client.informer import Informer
from podwire.client.kubeconfig import client_from_kubeconfig, in_cluster_client
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import current_netns
from podwire.model.errors import InvalidInput, PodwireError
from podwire.model.netconf import parse_net_config
from podwire.model.objects import Node
from podwire.model.resources import NODES, PODS
from podwire.model.timestamps import format_time
from podwire.plan.underlay import Wish

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]
"""The options of `podwire agent`, by parameter name."""


def run_agent(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises PodwireError for what the user can mend."""
    levels = {0: logging.INFO, 1: logging.DEBUG}
    logging.basicConfig(
        level=levels.get(settings["verbose"], logging.DEBUG),
        stream=sys.stderr,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    if settings["verbose"] < 2:
        logging.getLogger("aiohttp").setLevel(logging.WARNING)
        logging.getLogger("asyncio").setLevel(logging.WARNING)
    if os.geteuid() != 0:
        raise InvalidInput("podwire agent changes this host's network: run it as root")
    asyncio.run(_until_signal(settings))


async def _until_signal(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(serve(settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        log.info("ended by a signal; devices and routes stay")
    except OSError as error:
        raise InvalidInput(f"the agent cannot go on: {error}") from error
    except ExceptionGroup as group:
        # The agent's tasks run in groups: what the user can mend comes out of them as itself.
        reason = _first(group)
        if isinstance(reason, PodwireError):
            raise reason from group
        if isinstance(reason, OSError):
            raise InvalidInput(f"the agent cannot go on: {reason}") from group
        raise


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


async def serve(settings: Settings) -> None:
    """Run the agent until cancelled."""
    subnet_file: Path = settings["subnet_file"]
    subnet_file.parent.mkdir(parents=True, exist_ok=True)
    lock = NodeLock(subnet_file.parent)
    netns = current_netns()
    kernel = LinuxKernel(netns)
    try:
        async with _subnet_manager(settings) as (subnets, node, client):
            agent = OverlayAgent(_options(settings, node), kernel, subnets, LinuxHost(netns))
            async with _status_server(settings, agent), asyncio.TaskGroup() as group:
                group.create_task(agent.run())
                if client is not None and settings["set_node_network_unavailable"]:
                    group.create_task(_say_available(agent, client, node))
    finally:
        await kernel.close()
        os.close(netns)
        lock.close()


def _options(settings: Settings, node: str) -> OverlayOptions:
    public = (settings["public_ip"], settings["public_ipv6"])
    return OverlayOptions(
        node=node,
        wish=Wish(
            names=tuple(settings["iface"]),
            patterns=tuple(settings["iface_regex"]),
            public=tuple(address for address in public if address is not None),
        ),
        can_reach=settings["iface_can_reach"],
        masquerade=settings["ip_masq"],
        fully_random=not settings["ip_masq_fully_random_disable"],
        forward_rules=settings["iptables_forward_rules"],
        resync=float(settings["iptables_resync"]),
        subnet_file=settings["subnet_file"],
        docker_file=settings["docker_options_file"],
        wireguard_key=settings["wireguard_key_file"],
    )


Managed = tuple[SubnetManager, str, ApiClient | None]
"""(manager, the node's name, the API server's client where there is one)."""


@asynccontextmanager
async def _subnet_manager(settings: Settings) -> AsyncIterator[Managed]:
    if settings["kube_subnet_mgr"] or settings["subnet_manager"] == "kube":
        async with _api_client(settings) as client, asyncio.TaskGroup() as group:
            node = await _node_name(settings, client)
            informer = Informer(client, NODES, Node)
            task = group.create_task(informer.run())
            path: Path = settings["net_config_path"]
            config = parse_net_config(_read(path), source=str(path), leased=False)
            manager = KubeSubnets(informer, node, config, client=client, prefix=settings["kube_annotation_prefix"])
            try:
                yield manager, node, client
            finally:
                task.cancel()
        return
    secured = any(settings[f"etcd_{name}"] for name in ("cafile", "certfile", "keyfile"))
    endpoints = settings["etcd_endpoints"].split(",")
    tls = None
    if secured or any(endpoint.strip().startswith("https://") for endpoint in endpoints):
        tls = etcd_tls(settings["etcd_cafile"], settings["etcd_certfile"], settings["etcd_keyfile"])
    user = (settings["etcd_username"], settings["etcd_password"]) if settings["etcd_username"] else None
    async with EtcdClient(endpoints, tls=tls, user=user) as etcd:
        yield (
            EtcdSubnets(
                etcd,
                prefix=settings["etcd_prefix"],
                last=read_last_subnets(settings["subnet_file"]),
                margin=60.0 * settings["subnet_lease_renew_margin"],
            ),
            settings["node_name"] or platform.node(),
            None,
        )


def _api_client(settings: Settings) -> ApiClient:
    if settings["kubeconfig_file"]:
        return client_from_kubeconfig(Path(settings["kubeconfig_file"]), user_agent="podwire/agent")
    if settings["kube_api_url"]:
        return ApiClient(settings["kube_api_url"], user_agent="podwire/agent")
    return in_cluster_client(os.environ, user_agent="podwire/agent")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: the network configuration cannot be read ({error}); see --net-config-path") from error


async def _node_name(settings: Settings, client: ApiClient) -> str:
    """As flannel finds it: NODE_NAME, or the node of the pod that this runs in."""
    if settings["node_name"]:
        return str(settings["node_name"])
    pod, namespace = os.environ.get("POD_NAME", ""), os.environ.get("POD_NAMESPACE", "")
    if pod and namespace:
        document = await client.get(PODS, pod, namespace)
        return str(document["spec"]["nodeName"])
    return platform.node()


async def _say_available(agent: OverlayAgent, client: ApiClient, node: str) -> None:
    """The scheduler keeps pods away from a Node whose network is said to be unavailable; cloud providers say so at first."""
    await agent.ready()
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


@asynccontextmanager
async def _status_server(settings: Settings, agent: OverlayAgent) -> AsyncIterator[None]:
    port: int = settings["healthz_port"]
    if not port:
        yield
        return
    address = settings["healthz_ip"]
    sock = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), port))
    except OSError as error:
        sock.close()
        raise InvalidInput(f"--healthz-port: {address}:{port} cannot be listened on ({error.strerror})") from error
    runner = web.AppRunner(status_app(agent.status), access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()
        sock.close()
