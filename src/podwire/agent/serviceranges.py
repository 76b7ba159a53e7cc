"""Where ClusterIPs come from: the cluster's ServiceCIDR objects (Kubernetes 1.33), followed while they change."""

import asyncio
import logging
from collections.abc import Callable
from random import Random

from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.client.errors import ApiError, Forbidden, NotFound
from podwire.client.informer import Change, Informer
from podwire.model.addr import IPNetwork
from podwire.model.resources import SERVICECIDRS
from podwire.model.servicecidr import ServiceCIDR

log = logging.getLogger(__name__)

ASK_AGAIN_SECONDS = 600.0
"""How often a server is asked that had no such objects, or would not show them: it may have been upgraded."""


class ServiceRanges:
    """`otherwise`: the ranges where the API server tells none. `changed` is called when there are others."""

    def __init__(self, client: ApiClient, otherwise: tuple[IPNetwork, ...], rng: Random, changed: Callable[[], None]) -> None:
        self._client, self._otherwise, self._rng, self._changed = client, otherwise, rng, changed
        self._known = asyncio.Event()
        self._informer: Informer[ServiceCIDR] | None = None

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        held = self._informer.items().values() if self._informer else ()
        found = {network for item in held for network in item.networks}
        return tuple(sorted(found, key=lambda network: (network.version, network))) or self._otherwise

    async def known(self) -> None:
        """Returns once the API server has answered for the first time."""
        await self._known.wait()

    async def run(self) -> None:
        """Until cancelled."""
        await self._served()
        informer = Informer(self._client, SERVICECIDRS, ServiceCIDR, rng=self._rng)
        async with asyncio.TaskGroup() as group:
            group.create_task(informer.run())
            await informer.synced()
            self._informer = informer
            self._known.set()
            informer.subscribe(self._heard)

    def _heard(self, change: Change[ServiceCIDR]) -> None:
        if change.old is None or change.new is None or change.old.spec != change.new.spec:
            self._changed()

    async def _served(self) -> None:
        """Returns once the API server has shown that it has such objects."""
        backoff = Backoff(self._rng, initial=0.2, maximum=10.0)
        while True:
            try:
                await self._client.list(SERVICECIDRS)
            except (NotFound, Forbidden) as error:
                if not self._known.is_set():
                    log.info("unused addresses of the Service range are not refused, for the range is not known (%s)", error)
                self._known.set()
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            except ApiError as error:
                log.warning("ServiceCIDRs: %s", error)
                await asyncio.sleep(backoff.next())
            else:
                return
