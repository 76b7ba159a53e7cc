"""Puts an overlay agent together out of the options of `podwire agent`, and runs it until a signal."""

import asyncio
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from podwire.agent.nodelock import NodeLock
from podwire.agent.overlayd.agent import OverlayAgent, OverlayOptions
from podwire.agent.overlayd.files import read_last_subnets
from podwire.agent.overlayd.host import LinuxHost
from podwire.agent.subnets.etcd import EtcdSubnets
from podwire.cli.etcdaccess import etcd_client
from podwire.hosts.systemd import notify
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import current_netns
from podwire.kernel.syscalls import release_memory
from podwire.model.errors import InvalidInput, PodwireError
from podwire.plan.underlay import Wish

if TYPE_CHECKING:
    from pathlib import Path

    from podwire.agent.subnets.port import SubnetManager
    from podwire.model.addr import IPAddress

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]
"""The options of `podwire agent`, by parameter name."""

Ready = Callable[[], Awaitable[None]]
"""Returns once the agent's network is programmed."""


class Managed(NamedTuple):
    """`available` tells the API server when the network is there. `public`: what the Node says are its addresses for peers."""

    manager: "SubnetManager"
    node: str
    available: Callable[[Ready], Coroutine[Any, Any, None]] | None = None
    public: tuple["IPAddress", ...] = ()


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
        async with _subnet_manager(settings) as (subnets, node, available, forced):
            agent = OverlayAgent(_options(settings, node, forced), kernel, subnets, LinuxHost(netns))
            async with _status_server(settings, agent), asyncio.TaskGroup() as group:
                group.create_task(agent.run())
                group.create_task(_settle(agent))
                if available is not None:
                    group.create_task(available(agent.ready))
    finally:
        await kernel.close()
        os.close(netns)
        lock.close()


async def _settle(agent: OverlayAgent) -> None:
    """Taking a host over with thousands of peers needs memory that is not needed again."""
    await agent.ready()
    notify("READY=1")
    release_memory()


def _options(settings: Settings, node: str, forced: Sequence["IPAddress"]) -> OverlayOptions:
    """`forced`: public addresses that come before the options'."""
    given = (address for address in (settings["public_ip"], settings["public_ipv6"]) if address is not None)
    public = {address.version: address for address in (*given, *forced)}
    return OverlayOptions(
        node=node,
        wish=Wish(
            names=tuple(settings["iface"]),
            patterns=tuple(settings["iface_regex"]),
            public=tuple(public.values()),
        ),
        can_reach=settings["iface_can_reach"],
        masquerade=settings["ip_masq"],
        fully_random=not settings["ip_masq_fully_random_disable"],
        forward_rules=settings["iptables_forward_rules"],
        resync=float(settings["iptables_resync"]),
        blackhole=settings["ip_blackhole_route"],
        subnet_file=settings["subnet_file"],
        docker_file=settings["docker_options_file"],
        wireguard_key=settings["wireguard_key_file"],
    )


@asynccontextmanager
async def _subnet_manager(settings: Settings) -> AsyncIterator[Managed]:
    if settings["kube_subnet_mgr"] or settings["subnet_manager"] == "kube":
        from podwire.cli.agentkube import kube_manager  # one that leases from etcd need not hold this

        async with kube_manager(settings) as managed:
            yield managed
        return
    async with etcd_client(settings) as etcd:
        yield Managed(
            EtcdSubnets(
                etcd,
                prefix=settings["etcd_prefix"],
                last=read_last_subnets(settings["subnet_file"]),
                margin=60.0 * settings["subnet_lease_renew_margin"],
            ),
            settings["node_name"] or platform.node(),
        )


@asynccontextmanager
async def _status_server(settings: Settings, agent: OverlayAgent) -> AsyncIterator[None]:
    port: int = settings["healthz_port"]
    if not port:
        yield
        return
    from aiohttp import web  # 2 MB that an agent without this port need not hold

    from podwire.agent.overlayd.statusserver import status_app

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
