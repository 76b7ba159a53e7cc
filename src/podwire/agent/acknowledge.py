"""The node's word in the API that Services are programmed, given after its kernel was read back (model.acknowledgement)."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from random import Random

from podwire.agent.rounds import Round, Versions
from podwire.agent.services import ServiceSync
from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.client.errors import AlreadyExists, ApiError, Forbidden, NotFound
from podwire.model.acknowledgement import NAMESPACE, Acknowledgement, lease_document, lease_name
from podwire.model.resources import LEASES

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two acknowledgements at least. The first change after a pause is acknowledged at once."""


class Acknowledger:
    """Follows a `ServiceSync`. `last` is what was written last; `refused` why it cannot be, in words."""

    def __init__(self, client: ApiClient, node: str, sync: ServiceSync, clock: Callable[[], datetime], rng: Random) -> None:
        self._client, self._node, self._sync, self._clock, self._rng = client, node, sync, clock, rng
        self._changed = asyncio.Event()
        self._exists = True
        self.last: Versions | None = None
        self.refused = ""
        sync.subscribe(self._round)

    def _round(self, done: Round) -> None:
        # A round in which nothing changed (a repair, say) needs no new word.
        if not done.error and (done.changed or self.last is None):
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(self._rng, initial=0.1, maximum=30.0)
        loop = asyncio.get_running_loop()
        while True:
            await self._changed.wait()
            self._changed.clear()
            started = loop.time()
            versions = await self._sync.read_back()
            try:
                await self._write(versions)
            except ApiError as error:
                if isinstance(error, Forbidden) and not self.refused:
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
            node=self._node,
            services=versions.services,
            slices=versions.slices,
            mode=str(self._sync.mode or ""),
            at=self._clock(),
        )
        document = lease_document(ack)
        if self._exists:
            try:
                await self._client.patch(LEASES, lease_name(self._node), document, NAMESPACE)
            except NotFound:
                self._exists = False
            else:
                return
        try:
            await self._client.create(LEASES, document)
        except AlreadyExists:
            await self._client.patch(LEASES, lease_name(self._node), document, NAMESPACE)
        self._exists = True
