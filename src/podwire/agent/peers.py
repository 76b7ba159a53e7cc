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
        self._programmed: Mapping[str, NetState] = {}
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
        self._changed.set()

    def wanted(self) -> dict[str, NetState]:
        """All units as they are now, to adopt a node with."""
        return dict(self._wanted)

    def adopted(self, units: Mapping[str, NetState]) -> None:
        """These are in the kernel already. Call before `run`."""
        self._programmed = units

    @property
    def idle(self) -> bool:
        """Whether the kernel holds what was set."""
        return not self._busy and not self._changed.is_set()

    async def run(self, repair: Repair) -> None:
        """Until cancelled. What the kernel refuses is left to `repair`."""
        while True:
            self._busy = True
            self._changed.clear()
            wanted = dict(self._wanted)
            changed = {
                node: wanted.get(node, NOTHING)
                for node in wanted.keys() | self._programmed.keys()
                if wanted.get(node) != self._programmed.get(node)
            }
            self._programmed = wanted
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
