"""One of several processes at work at a time: leader election by a Lease, as client-go's leaderelection does it.

Clocks are not compared: who waits counts how long it has seen the Lease unchanged, by its own monotonic clock. The leader
stops its work `renew` seconds after its last success, which is before anyone else may start.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from random import Random

from podwire.client.api import ApiClient
from podwire.client.errors import AlreadyExists, ApiError, Conflict, NotFound
from podwire.model.errors import InvalidInput
from podwire.model.meta import Json
from podwire.model.resources import LEASES
from podwire.model.timestamps import format_micro_time

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ElectionTimes:
    """Seconds; kube-controller-manager's defaults. `lease`: so long unchanged, the Lease is free. `renew`: so long without
    success, the leader gives up. `retry`: between attempts of either."""

    lease: float = 15.0
    renew: float = 10.0
    retry: float = 2.0

    def __post_init__(self) -> None:
        if not self.lease > self.renew > self.retry > 0:
            raise InvalidInput(
                f"leader election: lease {self.lease:g} s must be longer than renew {self.renew:g} s, "
                f"and that longer than retry {self.retry:g} s"
            )


class LeaderElection:
    """`run(work)` does `work` while the Lease `namespace`/`name` is held under `identity`, which must be this process's own."""

    def __init__(
        self,
        client: ApiClient,
        name: str,
        identity: str,
        now: Callable[[], datetime],
        *,
        namespace: str = "kube-system",
        times: ElectionTimes | None = None,
        rng: Random | None = None,
    ) -> None:
        self._client, self._name, self._namespace, self.identity = client, name, namespace, identity
        self._now, self._times, self._rng = now, times or ElectionTimes(), rng or Random()
        self._seen: tuple[object, ...] = ()
        self._seen_at = 0.0
        self.leading = False

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled; then the Lease is given back, so that the next one need not wait. `work` is cancelled when the
        Lease is lost, and started again when it is won again. Returns when it ends by itself; raises what it raises."""
        while True:
            while not await self._attempt():  # noqa: ASYNC110 - it is elsewhere that it changes
                await asyncio.sleep(self._times.retry * (1 + 0.2 * self._rng.random()))
            log.info("%s leads (%s)", self.identity, self._name)
            self.leading = True
            working = asyncio.ensure_future(work())
            try:
                if await self._hold(working):
                    return
            finally:
                self.leading = False
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                await self._release()
            log.warning("%s leads no more (%s)", self.identity, self._name)

    async def _hold(self, working: "asyncio.Future[None]") -> bool:
        """True when `working` is done (its error is raised), False when the Lease is lost."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while loop.time() - renewed < self._times.renew:
            done, _ = await asyncio.wait((working,), timeout=self._times.retry)
            if done:
                working.result()
                return True
            try:
                async with asyncio.timeout(max(0.0, renewed + self._times.renew - loop.time())):
                    began = loop.time()
                    if await self._attempt():
                        renewed = began
                    elif self._holder() not in ("", self.identity):
                        return False  # someone else has it
            except TimeoutError:
                break
        return False

    async def _attempt(self) -> bool:
        """Take or renew the Lease; False where someone else has it, or the API does not answer."""
        try:
            try:
                lease = await self._client.get(LEASES, self._name, self._namespace)
            except NotFound:
                lease = await self._client.create(LEASES, self._document())
                self._note(lease)
                return True
            self._note(lease)
            if self._holder() not in ("", self.identity) and not self._expired():
                return False
            lease["spec"] = self._spec(lease.get("spec") or {})
            self._note(await self._client.replace(LEASES, lease))
        except (Conflict, AlreadyExists):
            return False
        except ApiError as error:
            log.warning("leader election %s: %s", self._name, error)
            return False
        return True

    async def _release(self) -> None:
        """Give the Lease back if it is still ours; briefly, and not at any price."""
        try:
            async with asyncio.timeout(self._times.retry):
                lease = await self._client.get(LEASES, self._name, self._namespace)
                self._note(lease)
                if self._holder() == self.identity:
                    spec = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                    self._note(await self._client.replace(LEASES, {**lease, "spec": spec}))
        except (ApiError, TimeoutError) as error:
            log.debug("the lease %s was not given back: %s", self._name, error)

    def _note(self, lease: Json) -> None:
        spec = lease.get("spec") or {}
        seen = (spec.get("holderIdentity") or "", spec.get("renewTime"), spec.get("leaseDurationSeconds") or 0)
        if seen != self._seen:
            self._seen, self._seen_at = seen, asyncio.get_running_loop().time()

    def _holder(self) -> str:
        return str(self._seen[0]) if self._seen else ""

    def _expired(self) -> bool:
        """Whether the holder has been silent for as long as it said it might be."""
        duration = float(str(self._seen[2])) or self._times.lease
        return asyncio.get_running_loop().time() - self._seen_at > duration

    def _spec(self, before: Json) -> Json:
        now = format_micro_time(self._now())
        mine = before.get("holderIdentity") == self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(1, round(self._times.lease)),
            "acquireTime": before.get("acquireTime") or now if mine else now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (not mine and bool(before)),
        }

    def _document(self) -> Json:
        return {
            "apiVersion": LEASES.api_version,
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._spec({}),
        }
