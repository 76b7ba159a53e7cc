"""Nothing is trusted to stay: what others change in the node's namespace is heard of and put back within a second."""

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Protocol

from podwire.agent.health import Health
from podwire.agent.localnet import concerns_rules
from podwire.agent.plumbing import Plumbing, PlumbingError, describe, kind_of
from podwire.client.backoff import Backoff
from podwire.kernel.port import Kernel, KernelError, KernelEvent

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.15
"""How long changes gather before the node is looked at: pods that start make many, and looking costs milliseconds."""
CHECK_INTERVAL = 0.7
"""Seconds between two looks at the node. With SETTLE_SECONDS it keeps repairs below one second."""
LAZY_SECONDS = 5.0
"""How soon the node is looked at when only expected things were heard; under them a stranger's change could hide."""
WARY_SECONDS = 60.0
"""So long after a repair expected things are looked at as soon as others: who has changed something does it again."""
POLL_SECONDS, POLL_SHARE = 0.4, 0.05
"""How often WireGuard's devices are looked at, of which the kernel tells nothing: every so many seconds, or less often where it
would take more than this part of the time."""
AUDIT_SECONDS = 300.0
"""How often the node is looked at without being told of anything: notifications can be lost when a socket overflows."""


MOST_NAMED = 40
"""So many repaired things are named in a log line; a deleted bridge alone makes hundreds."""


class Rules(Protocol):
    """Whoever keeps nftables: compares its own with the kernel and puts them back when told that somebody changed some."""

    def request_resync(self, because: str = "") -> None: ...


class Repair:
    """Listens to the kernel and compares when something of ours may have gone. `heard` is told of everything, too."""

    def __init__(
        self,
        kernel: Kernel,
        plumbing: Plumbing,
        rules: Rules,
        health: Health,
        rng: Random,
        heard: Callable[[KernelEvent], None] = lambda event: None,
    ) -> None:
        self._kernel, self._plumbing, self._rules, self._health = kernel, plumbing, rules, health
        self._rng, self._also = rng, heard
        self._links = asyncio.Event()
        self._maybe = False
        """Something changed that looks like our own doing: worth a look when there is time."""
        self._wary_until = 0.0

    async def run(self) -> None:
        """Until cancelled. Start it when the node has been adopted."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._check_when_told())
            if self._plumbing.untold:
                group.create_task(self._look_for_the_untold())

    def request_check(self) -> None:
        """Compare soon, and until all is as it shall be."""
        self._links.set()

    async def _listen(self) -> None:
        while True:
            events = self._kernel.events()
            try:
                async for event in events:
                    self._heard(event)
            except KernelError as error:
                log.warning("kernel notifications: %s; comparing everything", error)
            finally:
                await events.aclose()
            self._rules.request_resync()
            self._links.set()
            await asyncio.sleep(CHECK_INTERVAL)

    async def _look_for_the_untold(self) -> None:
        """At what the kernel tells nobody of."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                if await self._plumbing.untold_changed():
                    self._links.set()
            except KernelError as error:
                log.warning("%s: %s", ", ".join(self._plumbing.untold), error)
            await asyncio.sleep(max(POLL_SECONDS, (loop.time() - began) / POLL_SHARE))

    def _heard(self, event: KernelEvent) -> None:
        self._also(event)
        if concerns_rules(event):
            self._rules.request_resync(event.subject)
        if event.what == "nft":
            return
        if not self._plumbing.expects(event):
            self._links.set()
        elif not event.ours:
            self._maybe = True
            if asyncio.get_running_loop().time() < self._wary_until:
                self._links.set()

    async def _check_when_told(self) -> None:
        backoff = Backoff(self._rng, initial=0.1, maximum=10.0)
        loop = asyncio.get_running_loop()
        earliest = loop.time()
        while True:
            try:
                async with asyncio.timeout(LAZY_SECONDS if self._maybe else AUDIT_SECONDS):
                    await self._links.wait()
            except TimeoutError:
                log.debug("nothing alarming was heard for long: looking anyway")
            await asyncio.sleep(max(SETTLE_SECONDS, earliest - loop.time()))
            earliest = loop.time() + CHECK_INTERVAL
            self._links.clear()
            self._maybe = False
            try:
                repaired = await self._plumbing.check()
            except (PlumbingError, KernelError) as error:
                self._health.failed("links", error)
                log.warning("repair failed: %s", error)
                self._links.set()
                await asyncio.sleep(backoff.next())
                continue
            self._plumbing.let_go()
            backoff.reset()
            self._health.works("links")
            if repaired:
                self._wary_until = loop.time() + WARY_SECONDS
                self._health.repairs += 1
                self._health.repaired.update(map(kind_of, repaired))
                words = list(dict.fromkeys(map(describe, repaired)))
                more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
                log.warning("put back what somebody changed: %s%s", ", ".join(words[:MOST_NAMED]), more)
