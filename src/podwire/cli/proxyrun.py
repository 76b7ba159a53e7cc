"""Puts a proxy together out of the options of `podwire proxy`, and runs it until a signal."""

import asyncio
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from aiohttp import web

from podwire.agent.nodelock import AnotherAgent
from podwire.agent.proxy.agent import ProxyAgent, ProxyEnvironment
from podwire.agent.proxy.nodename import node_name
from podwire.agent.proxy.status import health_app, metrics_app
from podwire.agent.proxymodes.kubeproxy import remove_kube_proxy
from podwire.agent.proxymodes.modes import ModeOptions, ProxyModes
from podwire.agent.registration import read_machine
from podwire.cli.configwatch import until_changed
from podwire.client.api import ApiClient
from podwire.client.errors import NotFound
from podwire.client.kubeconfig import client_from_kubeconfig, in_cluster_client
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import current_netns
from podwire.kernel.port import KernelError
from podwire.kernel.syscalls import return_large_blocks
from podwire.model.acknowledgement import NAMESPACE, lease_name
from podwire.model.errors import InvalidInput, PodwireError
from podwire.model.ops import SetSysctl
from podwire.model.proxyconfig import ProxyConfig, config_document, conntrack_switches, networks, parse_proxy_config
from podwire.model.resources import LEASES
from podwire.plan.programmed import SILENT

log = logging.getLogger(__name__)

USER_AGENT = "podwire/proxy"
_WORD_SECONDS = 5.0
"""How long --cleanup waits for the API server."""
_AGAIN_SECONDS = 5.0
"""How soon an address is tried again that cannot be listened on; kube-proxy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """The options. `overrides`: fields of the configuration that flags set."""

    config_file: Path | None = None
    written: Path | None = None
    kubeconfig: Path | None = None
    master: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    service_cidrs: tuple[str, ...] = ()
    cleanup: bool = False
    cleanup_kube_proxy: bool = False
    init_only: bool = False
    verbose: bool = False


def run_proxy(options: Invocation) -> None:
    """Until SIGTERM or SIGINT, or until the one thing is done that was asked for. Raises PodwireError."""
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    for name in ("aiohttp", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = load(options)
    if options.written is not None:
        _write(config, options.written)
        return
    if os.geteuid() != 0:
        raise InvalidInput("podwire proxy changes this host's rules: run it as root")
    if options.cleanup_kube_proxy:
        asyncio.run(_clean_up_kube_proxy())
        return
    return_large_blocks()
    with _alone():
        asyncio.run(_until_signal(options, config))


async def _clean_up_kube_proxy() -> None:
    netns = current_netns()
    kernel = LinuxKernel(netns)
    try:
        found = await remove_kube_proxy(kernel, netns)
    finally:
        await kernel.close()
        os.close(netns)
    log.info("removed of kube-proxy: %s", "; ".join(found) or "nothing, there was nothing of it")


def load(options: Invocation) -> ProxyConfig:
    """The configuration with the flags on top; of what is not known in it, the log tells. Raises InvalidInput."""
    config, warnings = _read(options)
    for warning in warnings:
        log.warning("%s", warning)
    return config


def _read(options: Invocation) -> tuple[ProxyConfig, list[str]]:
    text, source = b"", "flags"
    if options.config_file is not None:
        source = str(options.config_file)
        try:
            text = options.config_file.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{source}: cannot be read ({error.strerror}); give a KubeProxyConfiguration") from error
    return parse_proxy_config(text, source, options.overrides)


def _write(config: ProxyConfig, path: Path) -> None:
    try:
        path.write_text(yaml.safe_dump(config_document(config), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written ({error.strerror}); see --write-config-to") from error
    log.info("wrote the configuration to %s", path)


def _alone() -> socket.socket:
    """One proxy to a network namespace: an abstract socket belongs to it, and goes with the process. Raises AnotherAgent."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind("\0podwire-proxy")
    except OSError as error:
        lock.close()
        raise AnotherAgent("another podwire proxy serves this host already: stop it first") from error
    return lock


async def _until_signal(options: Invocation, config: ProxyConfig) -> None:
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(serve(options, config))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        log.info("ended by a signal; the rules stay")
    except ExceptionGroup as group:
        # The proxy's tasks run in a group: what the user can mend comes out of it as itself.
        known = group.subgroup(PodwireError)
        if known is None:
            raise
        raise known.exceptions[0] from group


async def serve(options: Invocation, config: ProxyConfig) -> None:
    """Run the proxy until cancelled. Raises ConfigChanged."""
    netns = current_netns()
    kernel = LinuxKernel(netns)
    modes = ProxyModes(kernel, netns, _mode_options(config))
    try:
        if options.cleanup:
            await _take_back_word(options, config)
            found = await modes.clean_up()
            log.info("removed: %s", ", ".join(found) or "nothing, there was nothing of ours")
            return
        if options.init_only:
            await _set_switches(kernel, config)
            return
        node = node_name(config.hostname_override, platform.node())
        await modes.say_who_drops(config.proxy_mode)
        async with _client(options, config) as client:
            agent = ProxyAgent(
                ProxyEnvironment(
                    node=node,
                    config=config,
                    kernel=kernel,
                    client=client,
                    make_rules=modes.make(config.proxy_mode),
                    others=modes,
                    service_cidrs=networks(options.service_cidrs, "--service-cluster-ip-range"),
                    cpus=os.cpu_count() or 1,
                    boot=read_machine().boot_id,
                )
            )
            async with asyncio.TaskGroup() as group:
                for address, app in _apps(config, agent):
                    group.create_task(_keep_serving(address, app, hard=config.bind_address_hard_fail))
                if options.config_file is not None:
                    group.create_task(until_changed(options.config_file, lambda: _read(options)[0], config))
                await agent.run()
    finally:
        await kernel.close()
        os.close(netns)


async def _take_back_word(options: Invocation, config: ProxyConfig) -> None:
    """Nothing is programmed here any more. An API server that cannot be reached keeps nobody from cleaning up."""
    name = lease_name(node_name(config.hostname_override, platform.node()))
    try:
        async with asyncio.timeout(_WORD_SECONDS), _client(options, config) as client:
            await client.delete(LEASES, name, NAMESPACE)
    except NotFound:
        return
    except (PodwireError, TimeoutError) as error:
        why = str(error) or "the API server does not answer"
        log.warning(
            "the API says for %d min more that Services are programmed here (Lease %s): %s",
            SILENT.total_seconds() / 60,
            name,
            why,
        )


async def _set_switches(kernel: LinuxKernel, config: ProxyConfig) -> None:
    """All of them, or KernelError that names those that could not be."""
    switches = conntrack_switches(config.conntrack, cpus=os.cpu_count() or 1)
    applied = await kernel.apply(tuple(SetSysctl(key, value) for key, value in switches.items()))
    if applied.failures:
        raise KernelError("; ".join(failure.message for failure in applied.failures), applied.failures[0].errno)
    log.info("set: %s", ", ".join(f"{key} to {value}" for key, value in switches.items()) or "nothing is asked for")


def _mode_options(config: ProxyConfig) -> ModeOptions:
    return ModeOptions(
        masquerade_bit=config.iptables.masquerade_bit,
        drop_invalid=not config.conntrack.tcp_be_liberal,
        scheduler=config.ipvs.scheduler or "rr",
        strict_arp=config.ipvs.strict_arp,
    )


def _client(options: Invocation, config: ProxyConfig) -> ApiClient:
    master = _master(options.master) if options.master else ""
    if options.kubeconfig is not None:
        return client_from_kubeconfig(options.kubeconfig, user_agent=USER_AGENT, server=master)
    if named := config.client_connection.kubeconfig:
        try:
            return client_from_kubeconfig(Path(named), user_agent=USER_AGENT, server=master)
        except InvalidInput as error:
            said = f"{options.config_file}: clientConnection.kubeconfig: {error} (--kubeconfig names another)"
            raise InvalidInput(said) from error
    if master:
        return ApiClient(master, user_agent=USER_AGENT)
    return in_cluster_client(os.environ, user_agent=USER_AGENT)


def _master(text: str) -> str:
    """A URL; `host:port` is one of HTTP, as client-go takes it."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not url.split()[1:]
    except ValueError:
        good = False
    if not good:
        raise InvalidInput(f"--master: {text!r} is no URL of an API server such as http://127.0.0.1:8080")
    return url.rstrip("/")


def _apps(config: ProxyConfig, agent: ProxyAgent) -> list[tuple[tuple[str, int], web.Application]]:
    """What is served where."""
    metrics = agent.metrics
    health = health_app(agent.health, lambda: datetime.now(UTC), metrics.healthz, metrics.livez)
    numbers = metrics_app(lambda: agent.mode, agent.metrics_text, agent.endpoints_text, lambda: agent.health().healthy)
    return [(address, app) for address, app in ((config.healthz_at, health), (config.metrics_at, numbers)) if address]


async def _keep_serving(address: tuple[str, int], app: web.Application, *, hard: bool) -> None:
    """Until cancelled. Where the address is taken: again and again, or (`hard`) InvalidInput."""
    host, port = address
    while True:
        try:
            async with _serving(host, port, app):
                await asyncio.get_running_loop().create_future()
        except OSError as error:
            message = (
                f"{host}:{port} cannot be listened on ({error.strerror}); see --healthz-bind-address, --metrics-bind-address"
            )
            if hard:
                raise InvalidInput(message) from error
            log.warning("%s; again in %d s", message, _AGAIN_SECONDS)
            await asyncio.sleep(_AGAIN_SECONDS)


def _listen(host: str, port: int) -> socket.socket:
    """As Go does: 0.0.0.0 and :: are each all addresses of both families, where there are both."""
    if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=64)


@asynccontextmanager
async def _serving(host: str, port: int, app: web.Application) -> AsyncIterator[None]:
    sock = _listen(host, port)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    try:
        await runner.setup()
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()
        sock.close()
