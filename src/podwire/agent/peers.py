"""The other nodes in this node's kernel: what is wanted for each, and the task that programs the difference."""

import asyncio
import logging
from collections.abc import Mapping

from podwire.agent.plumbing import Plumbing, PlumbingError
from podwire.agent.repair import Repair
from podwire.kernel.port import KernelError
from podwire.model.kernelstate import NetState

log = logging.getLogger(__name__)

NOTHING = NetState()


class PeerSync:
    """Set what is wanted at any time; `run` makes it so. Changes gather while one is being applied."""

    def __init__(self, plumbing: Plumbing) -> None:
        self._plumbing = plumbing
        self._wanted: dict[str, NetState] = {}
        self._programmed: dict[str, NetState] = {}
        self._touched: set[str] = set()
        """Whose units were set since they were last compared: with 5,000 peers, comparing all costs milliseconds."""
        self._changed = asyncio.Event()
        self._busy = True
        self.apply_seconds = 0.0
        """What the last change took."""

    def set(self, node: str, unit: NetState) -> None:
        """How `node` is reached from now on; an empty state: not at all."""
        if unit == self._wanted.get(node, NOTHING):
            return
        if unit == NOTHING:
            del self._wanted[node]
        else:
            self._wanted[node] = unit
        self._touched.add(node)
        self._changed.set()

    def wanted(self) -> dict[str, NetState]:
        """All units as they are now, to adopt a node with."""
        return dict(self._wanted)

    def adopted(self, units: Mapping[str, NetState]) -> None:
        """These are in the kernel already. Call before `run`."""
        self._programmed = dict(units)
        self._touched |= self._programmed.keys() - self._wanted.keys()

    @property
    def idle(self) -> bool:
        """Whether the kernel holds what was set."""
        return not self._busy and not self._changed.is_set()

    async def run(self, repair: Repair) -> None:
        """Until cancelled. What the kernel refuses is left to `repair`."""
        while True:
            self._busy = True
            self._changed.clear()
            changed = self._take_changed()
            started = asyncio.get_running_loop().time()
            try:
                if changed:
                    await self._plumbing.set_peers(changed)
                    self.apply_seconds = asyncio.get_running_loop().time() - started
            except (PlumbingError, KernelError) as error:
                log.warning("%s; left to repair", error)
                repair.request_check()
            self._busy = False
            await self._changed.wait()

    def _take_changed(self) -> dict[str, NetState]:
        """What has to be programmed; counts as programmed from now on."""
        touched, self._touched = self._touched, set()
        changed = {
            node: self._wanted.get(node, NOTHING)
            for node in touched
            if self._wanted.get(node) != self._programmed.get(node)
        }  # fmt: skip
        for node, unit in changed.items():
            if unit == NOTHING:
                self._programmed.pop(node, None)
            else:
                self._programmed[node] = unit
        return changed
