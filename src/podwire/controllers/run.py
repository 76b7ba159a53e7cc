"""All controllers together."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Protocol

from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.controllers.base import Context
from podwire.controllers.config import ControllersConfig
from podwire.controllers.deployments import Deployments
from podwire.controllers.endpointslices import EndpointSlices
from podwire.controllers.garbage import GarbageCollector
from podwire.controllers.loadbalancers import LoadBalancers
from podwire.controllers.namespaces import NamespaceContents, NamespaceDeletion
from podwire.controllers.nodeipam import NodeIpam
from podwire.controllers.nodelifecycle import NodeLifecycle
from podwire.controllers.replicasets import ReplicaSets
from podwire.controllers.scheduler import Scheduler
from podwire.controllers.serviceaddresses import ServiceAddresses

log = logging.getLogger(__name__)


class Loop(Protocol):
    """A controller at work: it runs until it is cancelled or fails."""

    async def run(self) -> None: ...


class LoopMaker(Protocol):
    """A controller's class: each attempt is a new instance, which starts over with all that exists."""

    @property
    def name(self) -> str: ...

    def __call__(self, context: Context) -> Loop: ...


CONTROLLERS: tuple[LoopMaker, ...] = (
    NodeIpam,
    Scheduler,
    EndpointSlices,
    ReplicaSets,
    Deployments,
    LoadBalancers,
    ServiceAddresses,
    NamespaceContents,
    NamespaceDeletion,
    GarbageCollector,
    NodeLifecycle,
)

NAMES = frozenset(controller.name for controller in CONTROLLERS)


def _utc_now() -> datetime:
    return datetime.now(UTC)


async def run_controllers(
    client: ApiClient,
    config: ControllersConfig,
    *,
    now: Callable[[], datetime] = _utc_now,
    rng: Random | None = None,
    on_synced: Callable[[], None] | None = None,
) -> None:
    """Runs until cancelled. A controller that fails is started again after a back-off; the others do not notice.

    `on_synced` is called once all informers have their first lists.
    """
    rng = rng or Random()
    context = Context(client, config, now, rng)
    async with asyncio.TaskGroup() as group:
        for informer in context.cluster.informers:
            group.create_task(informer.run(), name=f"informer {informer.resource.plural}")
        group.create_task(context.events.run(), name="events")
        for make in CONTROLLERS:
            if make.name not in config.disabled:
                group.create_task(_keep_running(make, context, rng), name=f"controller {make.name}")
        await context.cluster.synced()
        if on_synced is not None:
            on_synced()


async def _keep_running(make: LoopMaker, context: Context, rng: Random) -> None:
    backoff = Backoff(rng, initial=0.5, maximum=30.0)
    while True:
        try:
            await make(context).run()
        except Exception:
            # The task boundary of one controller: a bug in it, or an object it cannot digest, must not end the others.
            delay = backoff.next()
            log.exception("controller %s failed; it starts again in %.1f s", make.name, delay)
            await asyncio.sleep(delay)
