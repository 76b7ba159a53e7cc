"""The kernel's switch route_localnet, which node ports on 127.0.0.1 need, and who switched it on.

While it is on, only a rule of ours keeps others away from what listens on 127.0.0.1 (CVE-2020-8558). So it is switched on
after that rule is there, and off before that rule goes.
"""

import logging

from podwire.agent.health import Health
from podwire.kernel.port import Kernel, KernelError, KernelEvent
from podwire.model.ops import SetSysctl

log = logging.getLogger(__name__)

LOCALNET = "net/ipv4/conf/all/route_localnet"
OFF = "0"
OURS = "2"
"""The kernel takes any number but 0 for yes. So the value tells, also to a later life of this program, who said yes:
kube-proxy and people write 1, which is theirs and stays."""


async def withdraw(kernel: Kernel) -> bool:
    """Switch it off if it was switched on here. Whether that was so. Raises KernelError; then the rule has to stay."""
    if await kernel.read_sysctl(LOCALNET) != OURS:
        return False
    await _set(kernel, OFF)
    log.info("%s is %s again", LOCALNET, OFF)
    return True


def concerns_rules(event: KernelEvent) -> bool:
    """Whether somebody else may have changed something that Services depend on."""
    if event.ours:
        return False
    return event.what in ("nft", "lost") or (event.what == "sysctl" and event.subject.startswith(f"{LOCALNET} "))


class LocalhostSwitch:
    """Keeps it on; what somebody else did to it is put back, named and counted."""

    def __init__(self, kernel: Kernel, health: Health) -> None:
        self._kernel, self._health = kernel, health
        self._on = False

    async def allow(self) -> None:
        """Call it again whenever somebody may have changed it. Where it may not be written, that is said once."""
        try:
            held = await self._kernel.read_sysctl(LOCALNET)
            # Written also where it is on: the kernel port watches what was set through it.
            if not self._on or held in (OFF, ""):
                await _set(self._kernel, OURS if held in (OFF, "") else held)
        except KernelError as error:
            if LOCALNET not in self._health.degraded:
                log.warning("services: no node port answers on 127.0.0.1: %s", error)
            self._health.failed(LOCALNET, error)
            return
        if self._on and held == OFF:
            self._health.repairs += 1
            self._health.repaired["sysctl"] += 1
            log.warning("services: put back what somebody changed: %s was %s", LOCALNET, held)
        self._on = True
        self._health.works(LOCALNET)

    async def forbid(self) -> None:
        """Before the rule goes that keeps others away. Raises KernelError."""
        self._on = False
        self._health.works(LOCALNET)
        await withdraw(self._kernel)


async def _set(kernel: Kernel, value: str) -> None:
    applied = await kernel.apply((SetSysctl(LOCALNET, value),))
    if applied.failures:
        raise KernelError(applied.failures[0].message, applied.failures[0].errno)
