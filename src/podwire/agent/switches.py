"""Kernel switches that could not be set: worse, not unusable, so it is told and not tried again each time. A device's switch
is tried again with the device: one that was not there a moment ago has switches of its own.
"""

import logging
from collections.abc import Iterable

from podwire.model.ops import AddLink, Applied, Failure, Plan, SetSysctl

log = logging.getLogger(__name__)


class RefusedSwitches:
    """`words`: by key, what the kernel said."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self._present: frozenset[str] = frozenset()

    def devices(self, present: Iterable[str]) -> None:
        """These are the namespace's devices now."""
        before, self._present = self._present, frozenset(present)
        new = self._present - before
        for key in [key for key in self.words if _device(key) in new]:
            del self.words[key]

    def worth_trying(self, plan: Plan) -> Plan:
        """The plan without those that were refused before."""
        made = {op.link.name for op in plan if isinstance(op, AddLink)}
        return tuple(op for op in plan if not isinstance(op, SetSysctl) or op.key not in self.words or _device(op.key) in made)

    def note(self, plan: Plan, applied: Applied) -> tuple[Failure, ...]:
        """Remember what became of the plan's switches; returns the failures of other operations."""
        failures = {f.op.key: f.message for f in applied.failures if isinstance(f.op, SetSysctl)}
        for op in plan:
            if isinstance(op, SetSysctl) and op.key not in failures:
                self.words.pop(op.key, None)
        for key, message in failures.items():
            if key not in self.words:
                log.warning("%s cannot be set on this machine: %s", key, message)
            self.words[key] = message
        return tuple(f for f in applied.failures if not isinstance(f.op, SetSysctl))


def _device(key: str) -> str:
    """The device whose switch it is (`net/ipv4/conf/eth0/rp_filter`); empty for one of the whole namespace."""
    parts = key.split("/")
    return parts[3] if len(parts) > 4 and parts[2] in ("conf", "neigh") and parts[3] not in ("all", "default") else ""
