"""The node's word in the API that Services are programmed, given after its kernel was read back (model.acknowledgement)."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from random import Random
from typing import Protocol

from podwire.agent.rounds import OnRound, Round, Versions
from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.client.errors import AlreadyExists, ApiError, Forbidden, NotFound
from podwire.model.acknowledgement import NAMESPACE, Acknowledgement, Speaker, lease_document, lease_name
from podwire.model.proxymode import ProxyMode
from podwire.model.resources import LEASES

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0
"""How often, when nothing changes, the word is given anew, with the revision that bookmarks tell: it shows that somebody still
keeps the rules (`plan.programmed.SILENT`), and whoever asks what was removed since it must not be sent back further than API
servers remember (kube-apiserver: 5 minutes)."""
INTERVAL = 1.0
"""Seconds between two acknowledgements at least. The first change after a pause is acknowledged at once."""


class Programs(Protocol):
    """A `ServiceSync`, as far as this is concerned."""

    @property
    def mode(self) -> ProxyMode | None: ...

    @property
    def versions(self) -> Versions: ...

    def subscribe(self, observer: OnRound) -> None: ...

    async def read_back(self) -> Versions: ...


class Acknowledger:
    """Follows a `ServiceSync`. `last` is what was written last; `refused` why it cannot be, in words."""

    def __init__(
        self,
        client: ApiClient,
        speaker: Speaker,
        sync: Programs,
        clock: Callable[[], datetime],
        rng: Random,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._idle_seconds = idle_seconds
        self._client, self._speaker, self._sync, self._clock, self._rng = client, speaker, sync, clock, rng
        self._changed = asyncio.Event()
        self._exists, self._begun = True, False
        self.last: Versions | None = None
        self.refused = ""
        sync.subscribe(self._round)

    def _round(self, done: Round) -> None:
        # A round in which nothing changed (a repair, say, or reading back) needs no new word once there is one to be given.
        if not done.error and (done.changed or not self._begun):
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(self._rng, initial=0.1, maximum=5.0)
        loop = asyncio.get_running_loop()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._idle_seconds):
                    await self._changed.wait()
            self._changed.clear()
            self._begun = True
            started = loop.time()
            versions = await self._sync.read_back()
            try:
                await self._write(versions)
            except ApiError as error:
                if isinstance(error, Forbidden) and self.refused != str(error):
                    log.warning("Services are programmed, but this node may not say so in the API: %s", error)
                else:
                    log.debug("acknowledging Services: %s", error)
                self.refused = str(error)
                self._changed.set()
                await asyncio.sleep(backoff.next())
                continue
            self.last, self.refused = versions, ""
            backoff.reset()
            await asyncio.sleep(max(0.0, started + INTERVAL - loop.time()))

    async def _write(self, versions: Versions) -> None:
        ack = Acknowledgement(
            node=self._speaker.node,
            services=versions.services,
            slices=versions.slices,
            slices_until=versions.slices_until,
            mode=str(self._sync.mode or ""),
            at=self._clock(),
            boot=self._speaker.boot,
        )
        name = lease_name(self._speaker.node)
        document = lease_document(ack)
        if self._exists:
            try:
                await self._client.patch(LEASES, name, document, NAMESPACE)
            except NotFound:
                self._exists = False
            else:
                return
        try:
            await self._client.create(LEASES, document)
        except AlreadyExists:
            await self._client.patch(LEASES, name, document, NAMESPACE)
        self._exists = True
