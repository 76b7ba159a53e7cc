"""The node's presence in the API: its Node object, the conditions on it, and the Lease that says "still alive"."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from random import Random

import msgspec

from podwire.agent.config import AgentConfig
from podwire.agent.registration import (
    LEASE_NAMESPACE,
    Machine,
    NodeState,
    lease_document,
    lease_spec,
    node_document,
    node_status,
)
from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.client.errors import AlreadyExists, ApiError, NotFound
from podwire.model.objects import Condition, Node
from podwire.model.resources import LEASES, NODES

log = logging.getLogger(__name__)

STATUS_SECONDS = 300.0
"""How old an unchanged status may become (the kubelet's nodeStatusReportFrequency)."""

TAKEOVER_SECONDS = 10.0
"""How long a new agent lets stand that the node is ready, if the one before said so: the pods and rules are there, and
balancers would move connections away from a node that blinks."""


class Presence:
    """Registers the node, keeps its Lease renewed and its status true. One task runs `run`; the others set `state`."""

    def __init__(
        self,
        config: AgentConfig,
        client: ApiClient,
        machine: Machine,
        clock: Callable[[], datetime],
        rng: Random,
        *,
        annotate: bool = True,
    ) -> None:
        """`annotate`: say on the Node how the node is reached through VXLAN; else a subnet manager does."""
        self._config, self._client, self._machine = config, client, machine
        self._clock, self._rng, self._annotate = clock, rng, annotate
        self._state = NodeState()
        self._written: NodeState | None = None
        self._written_at: float | None = None
        self._conditions: tuple[Condition, ...] = ()
        self._taken_over_until: float | None = None
        self._uid = ""
        self._has_lease = False
        self._gone = False
        self._wake = asyncio.Event()

    def set_state(self, state: NodeState) -> None:
        if state != self._state:
            self._state = state
            self._wake.set()

    def seen(self, node: Node) -> None:
        """The node's own object as the API has it now. Another's verdict on it (Ready=Unknown after missed heartbeats) is
        answered with the truth."""
        self._conditions = node.status.conditions
        self._uid = node.metadata.uid
        if self._gone:
            self._gone, self._written = False, None
            self._wake.set()
        if self._written is not None and self._written.ready != node.ready:
            self._written = None
            self._wake.set()

    def gone(self) -> None:
        """The Node was deleted: someone took the node out of the cluster. No heartbeats until it is there again."""
        self._gone = True

    async def register(self) -> None:
        """Create the Node, or take over the one there is; tries until it succeeds."""
        backoff = Backoff(self._rng, initial=0.05, maximum=5.0)
        while True:
            try:
                await self._register()
            except ApiError as error:
                delay = backoff.next()
                log.warning("node %s cannot be registered: %s; again in %.2f s", self._config.node_name, error, delay)
                await asyncio.sleep(delay)
            else:
                return

    async def run(self) -> None:
        """Heartbeats and status writes until cancelled; failures are logged and tried again with the next."""
        due = asyncio.get_running_loop().time()
        backoff = Backoff(self._rng, initial=0.05, maximum=self._config.heartbeat_seconds)
        while True:
            now = asyncio.get_running_loop().time()
            self._wake.clear()
            try:
                if not self._gone:
                    if now >= due:
                        await self._renew()
                    await self._write_status()
                if now >= due:
                    due = now + self._config.heartbeat_seconds
            except ApiError as error:
                delay = backoff.next()
                log.warning("node %s: heartbeat failed: %s; again in %.2f s", self._config.node_name, error, delay)
                await asyncio.sleep(delay)
                continue
            backoff.reset()
            try:
                async with asyncio.timeout(max(0.0, due - asyncio.get_running_loop().time())):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _register(self) -> None:
        name = self._config.node_name
        document = node_document(self._config, self._machine)
        if not self._annotate:
            del document["metadata"]["annotations"]
        try:
            node = await self._client.create(NODES, document)
        except AlreadyExists:
            said = {key: value for key, value in document["metadata"].items() if key in ("labels", "annotations")}
            node = await self._client.patch(NODES, name, {"metadata": said})
            if msgspec.convert(node, Node).ready:
                self._taken_over_until = asyncio.get_running_loop().time() + TAKEOVER_SECONDS
        self._uid = node["metadata"]["uid"]

    async def _renew(self) -> None:
        name, now = self._config.node_name, self._clock()
        if self._has_lease:
            try:
                await self._client.patch(LEASES, name, {"spec": lease_spec(self._config, now)}, LEASE_NAMESPACE)
            except NotFound:
                self._has_lease = False
            else:
                return
        try:
            await self._client.create(LEASES, lease_document(self._config, self._uid, now))
        except AlreadyExists:
            await self._client.patch(LEASES, name, {"spec": lease_spec(self._config, now)}, LEASE_NAMESPACE)
        self._has_lease = True

    async def _write_status(self) -> None:
        # By the event loop's clock, which nobody sets: the machine's may jump by hours.
        state, now = self._state, asyncio.get_running_loop().time()
        if self._taken_over_until is not None:
            if not state.ready and now < self._taken_over_until:
                return
            self._taken_over_until = None
        fresh = self._written_at is not None and now - self._written_at < STATUS_SECONDS
        if state == self._written and fresh:
            return
        patch = node_status(self._config, self._machine, state, self._conditions, self._clock())
        # Noted before the request: its echo through the watch may come before its answer.
        self._written, self._written_at = state, now
        try:
            await self._client.patch(NODES, self._config.node_name, patch, subresource="status")
        except ApiError:
            self._written = None
            raise
