"""What a host's setup follows from, while it is in use: the network configuration and the interface to the other hosts.

A configuration under which this host would lose its subnet is not followed: one mistake in one key would take the addresses
from all pods of all hosts. It is said, and waits for the agent to start again, or for the lease to be lost anyway.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from podwire.agent.health import Health
from podwire.agent.overlayd.setup import Setup, SetupMaker
from podwire.agent.subnets.port import SubnetManager
from podwire.kernel.port import Kernel, KernelError, KernelEvent
from podwire.model.errors import InvalidInput, Unsupported
from podwire.model.netconf import NetConfig

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2
"""An address that changes goes before the new one comes."""
RETRY_SECONDS = 2.0
"""How soon an interface that cannot be used is looked at again: of a new default route nobody tells."""

CONFIGURATION, INTERFACE = "configuration", "interface"
"""Subjects of what does not work."""


class Surroundings:
    """`run` until cancelled. `changed` is called with the setup that should take the place of the one in use."""

    def __init__(
        self, maker: SetupMaker, kernel: Kernel, subnets: SubnetManager, health: Health, changed: Callable[[Setup], None]
    ) -> None:
        self._maker, self._kernel, self._subnets, self._health = maker, kernel, subnets, health
        self._changed = changed
        self._setup: Setup | None = None
        self._config: NetConfig | None = None
        """The one to follow: that in use, or a later one that suits the lease."""
        self._waiting: NetConfig | None = None
        """One that would cost the lease."""
        self._look = asyncio.Event()

    def in_use(self, setup: Setup) -> None:
        """This is what the host is set up with from now on."""
        self._setup = setup
        if self._config is None:
            self._config = setup.config

    def heard(self, event: KernelEvent) -> None:
        """Something in the kernel changed."""
        setup = self._setup
        if setup is None or event.what not in ("link", "address", "lost"):
            return
        device = setup.underlay.device
        about = event.subject.rpartition(" on ")[2] == device
        if about or event.what == "lost" or INTERFACE in self._health.degraded:
            self._look.set()

    def look(self) -> None:
        """Compare soon: something may have changed unheard."""
        self._look.set()

    def lease_changed(self) -> None:
        """The node has another lease: a configuration that the former one was kept from may suit it."""
        if self._waiting is not None:
            self._consider(self._waiting)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_config())
            group.create_task(self._follow())

    async def _follow_config(self) -> None:
        while True:
            try:
                config = await self._subnets.next_config()
            except (InvalidInput, Unsupported) as error:
                self._refuse(f"{error}; going on with the former one")
                continue
            for warning in config.warnings:
                log.warning("%s", warning)
            self._consider(config)

    def _consider(self, config: NetConfig) -> None:
        if not self._subnets.suits(config):
            self._waiting = config
            lease = self._subnets.own.lease
            subnets = ", ".join(map(str, lease.subnets)) if lease else "none"
            self._refuse(f"the network configuration has changed, and has no room for {subnets}: restart needed to follow it")
            return
        self._config, self._waiting = config, None
        self._health.works(CONFIGURATION)
        self._look.set()

    async def _follow(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if INTERFACE in self._health.degraded else None):
                    await self._look.wait()
            self._look.clear()
            await asyncio.sleep(SETTLE_SECONDS)
            if self._setup is None:
                continue
            try:
                setup = await self._made(self._setup)
            except (InvalidInput, Unsupported, KernelError, OSError) as error:
                if INTERFACE not in self._health.degraded:
                    log.warning("%s; going on with what there was", error)
                self._health.failed(INTERFACE, error)
                continue
            self._health.works(INTERFACE)
            if setup != self._setup:
                self._changed(setup)

    async def _made(self, current: Setup) -> Setup:
        devices = await self._kernel.observe_devices()
        if self._config is not None and self._config != current.config:
            try:
                return self._maker.make(self._config, devices, current)
            except (InvalidInput, Unsupported, OSError) as error:
                self._refuse(f"the new network configuration cannot be used here: {error}; going on with the former one")
                self._config = current.config
        return self._maker.make(current.config, devices, current)

    def _refuse(self, why: str) -> None:
        if self._health.degraded.get(CONFIGURATION) != why:
            log.error("%s", why)
        self._health.failed(CONFIGURATION, why)
