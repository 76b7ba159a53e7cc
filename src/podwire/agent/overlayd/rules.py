"""An overlay agent's firewall rules: masquerade in nftables, and an accept for forwarded pod packets in iptables.

The accept must be in iptables' own chain FORWARD, because a policy of DROP there (Docker sets it) is final whatever another
table says. It is flannel's chain by name and content, so that either can follow the other on a host.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from podwire.agent.health import Health
from podwire.client.backoff import Backoff
from podwire.kernel.commands import Outcome, find_program, run_command
from podwire.kernel.port import Kernel, KernelError
from podwire.model.addr import IPNetwork
from podwire.model.nft import Ruleset
from podwire.model.ops import CommitNft
from podwire.plan.ipmasq import TABLE, no_rules
from podwire.plan.nftdiff import diff_ruleset

log = logging.getLogger(__name__)

RunCommand = Callable[[Sequence[str], str], Awaitable[Outcome]]


class MasqueradeRules:
    """Keeps our nftables tables as they shall be. `run` until cancelled; tell it of changes."""

    def __init__(self, kernel: Kernel, health: Health, rng: Random) -> None:
        self._kernel, self._health, self._rng = kernel, health, rng
        self._wanted = no_rules()
        self._set = False
        self._wake = asyncio.Event()
        self._programmed = asyncio.Event()

    def set(self, wanted: Ruleset) -> None:
        self._wanted, self._set = wanted, True
        self._programmed.clear()
        self._wake.set()

    def request_resync(self, because: str = "") -> None:
        self._wake.set()

    async def programmed(self) -> None:
        """Returns once the kernel holds what was set last."""
        await self._programmed.wait()

    async def run(self) -> None:
        backoff = Backoff(self._rng, initial=0.1, maximum=30.0)
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._set:
                continue
            try:
                await self._sync()
            except KernelError as error:
                self._health.failed("masquerade", error)
                log.warning("masquerade: %s", error)
                await asyncio.sleep(backoff.next())
                self._wake.set()
                continue
            backoff.reset()
            self._health.works("masquerade")

    async def _sync(self) -> None:
        wanted = self._wanted
        observed = await self._kernel.observe_nft(TABLE)
        batch = diff_ruleset(wanted, observed)
        if batch:
            applied = await self._kernel.apply((CommitNft(batch),))
            if applied.failures:
                raise KernelError(f"nftables refused the transaction: {applied.failures[0].message}", applied.failures[0].errno)
            self._health.commits += 1
            if self._programmed.is_set():
                self._health.repairs += 1
                self._health.repaired["rules"] += 1
                log.warning("put back what somebody changed: masquerade rules")
        if wanted is self._wanted:
            self._programmed.set()


CHAIN = "FLANNEL-FWD"
_COMMENT = ("-m", "comment", "--comment", "flanneld forward")
_PROGRAMS = {4: "iptables", 6: "ip6tables"}
_LOCK_SECONDS = "5"


def forward_text(network: IPNetwork) -> str:
    """For iptables-restore --noflush: the chain with exactly its two rules, in one step."""
    rules = "".join(f'-A {CHAIN} {flag} {network} -m comment --comment "flanneld forward" -j ACCEPT\n' for flag in ("-s", "-d"))
    return f"*filter\n:{CHAIN} - [0:0]\n{rules}COMMIT\n"


class ForwardRules:
    """Looks every `interval` seconds, as iptables does not tell of changes. Where there is no iptables nothing is needed."""

    def __init__(self, run: RunCommand, networks: tuple[IPNetwork, ...], health: Health, interval: float = 5.0) -> None:
        self._run_command, self._networks = run, networks
        self._health, self._interval = health, interval
        self._made: set[int] = set()

    async def run(self) -> None:
        while True:
            for network in self._networks:
                try:
                    await self._keep(network)
                except (OSError, KernelError) as error:
                    self._health.failed("forward rules", error)
                    log.warning("forward rules: %s", error)
                else:
                    self._health.works("forward rules")
            await asyncio.sleep(self._interval)

    async def _keep(self, network: IPNetwork) -> None:
        program = _PROGRAMS[network.version]
        if not find_program(program):
            return
        listed = await self._call(program, "-S", CHAIN)
        changed = False
        wanted = {f'-A {CHAIN} {flag} {network} -m comment --comment "flanneld forward" -j ACCEPT' for flag in ("-s", "-d")}
        present = [line for line in listed.out.splitlines() if line.startswith("-A ")]
        if listed.status or set(present) != wanted or len(present) != len(wanted):
            restored = await self._run_command((f"{program}-restore", "-w", _LOCK_SECONDS, "--noflush"), forward_text(network))
            _require(restored, f"{program}-restore")
            changed = True
        jump = ("FORWARD", *_COMMENT, "-j", CHAIN)
        if (await self._call(program, "-C", *jump)).status:
            _require(await self._call(program, "-A", *jump), program)
            changed = True
        if changed and network.version in self._made:
            self._health.repairs += 1
            self._health.repaired["rules"] += 1
            log.warning("put back what somebody changed: forward rules for %s", network)
        self._made.add(network.version)

    async def _call(self, program: str, *arguments: str) -> Outcome:
        return await self._run_command((program, "-w", _LOCK_SECONDS, *arguments), "")


def _require(outcome: Outcome, what: str) -> None:
    if outcome.status:
        words = (outcome.err or outcome.out).strip().splitlines()
        raise KernelError(f"{what} ended with status {outcome.status}: {words[0] if words else 'it said nothing'}")


def commands_in(netns_fd: int) -> RunCommand:
    """Programs run in that namespace."""

    async def run(argv: Sequence[str], stdin: str) -> Outcome:
        return await run_command(netns_fd, argv, stdin)

    return run
