"""The containers of an engine on this node: CNI's verbs on the agent's own addresses, links and host ports.

The order makes a crash harmless at any point, as with pods: an attachment and its addresses are on disk before a link has
them, and given up when the link is gone. What a killed agent or a forgetful engine leaves behind is found by the namespace:
one that is no more needs no address.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from podwire.agent.attachrecord import (
    AttachmentRecord,
    Origin,
    attachment_of,
    decode_record,
    host_port_pod,
    occupied,
    record_of,
    result_of,
)
from podwire.agent.cnispool import Spool
from podwire.agent.gate import Gate
from podwire.agent.health import Health
from podwire.agent.loopback import serve_loopback
from podwire.agent.plumbing import EnginePod, Plumbing, PlumbingError, link_stands
from podwire.agent.reservations import AddressTaken, Owner, Reservations
from podwire.kernel.port import Kernel, KernelError
from podwire.model.addr import IPAddress
from podwire.model.cni import (
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    IO_FAILURE,
    KERNEL_REFUSED,
    NO_ADDRESS,
    NOT_AVAILABLE,
    NOT_AVAILABLE_LIMITED,
    TRY_LATER,
    UNKNOWN_CONTAINER,
    AttachmentKey,
    CniError,
    CniRequest,
    CniResult,
)
from podwire.model.errors import PodwireError
from podwire.model.kernelstate import NetState
from podwire.model.objects import Pod
from podwire.plan.ipam import AddressesExhausted
from podwire.plan.node import NodeNetwork

log = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0
HOST_PORT_SECONDS = 15.0
"""How long ADD waits for host ports."""
CLOSING_SECONDS = 2.0
"""How long DEL does, before it leaves the rest for later."""
RETRY_SECONDS = 5.0

Listener = Callable[[AttachmentRecord, tuple[IPAddress, ...] | None], None]
"""Told of every attachment with its addresses, and with None when it is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachmentEnvironment:
    """What attachments share with the rest of the node; as in `podworker.PodEnvironment`. `services_known`: whether the rules
    for Services and host ports have been programmed once, so that a change of them is a matter of milliseconds. `boot` is
    this boot's id; `nsfs` a path on the file system of namespaces."""

    kernel: Kernel
    plumbing: Plumbing
    reservations: Reservations
    set_host_ports: Callable[[str, Pod | None], None]
    host_ports_programmed: Callable[[], Awaitable[None]]
    services_known: Callable[[], bool]
    spool: Spool
    health: Health
    clock: Callable[[], datetime]
    boot: str
    nsfs: Path = Path("/proc/self/ns/net")


class Attachments:
    """All attachments of the node. Methods may be called from many tasks; one attachment is worked on by one at a time."""

    def __init__(self, env: AttachmentEnvironment) -> None:
        """Reads the records of earlier agents."""
        self._env = env
        self._records: dict[str, AttachmentRecord] = {}
        for uid, raw in env.reservations.records.items():
            try:
                self._records[uid] = decode_record(raw)
            except msgspec.MsgspecError as error:
                log.error("the record of attachment %s cannot be read and is left alone: %s", uid, error)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._listeners: list[Listener] = []
        self._unreleased: dict[str, AttachmentKey] = {}
        """Attachments that are gone, whose addresses are not free yet; by uid."""
        self._network: NodeNetwork | None = None
        self._provisional = False
        self._opened, self._look = asyncio.Event(), asyncio.Event()
        self._gate = Gate()

    def subscribe(self, listener: Listener) -> None:
        """`listener` is called at once for all that exist, then for each that comes or goes."""
        self._listeners.append(listener)
        for record in self._records.values():
            listener(record, self.addresses(record))

    @property
    def records(self) -> tuple[AttachmentRecord, ...]:
        return tuple(self._records.values())

    def addresses(self, record: AttachmentRecord) -> tuple[IPAddress, ...]:
        held = self._env.reservations.of(record.uid)
        return held or tuple(ipaddress.ip_address(ip) for ip in record.ips)

    @property
    def ready(self) -> bool:
        """Whether the node has its network: before, nothing is attached or removed."""
        return self._network is not None

    @asynccontextmanager
    async def opening(self, network: NodeNetwork, *, provisional: bool = False) -> AsyncIterator[None]:
        """In the block the node's links are adopted, and nothing of what this class does happens; behind it, engines are
        served. `provisional`: the node's Services are not known yet, so that host ports are neither opened nor closed."""
        async with self._gate.alone():
            yield
            self._network, self._provisional = network, provisional
            self._opened.set()

    # --- the verbs ------------------------------------------------------------------------------------------------

    async def add(self, request: CniRequest, netns: int | None) -> CniResult:
        """Attach, or find attached. `netns` is the namespace's descriptor where the caller has it. Raises CniError."""
        self._network_or(TRY_LATER)
        fd = self._open_netns(request.netns, netns)
        try:
            async with self._gate.passing(), self._locked(request.key.uid):
                self._env.spool.forget(request.key)
                return await self._add(request, fd)
        finally:
            os.close(fd)

    async def delete(self, key: AttachmentKey, netns: int | None = None) -> None:
        """Detach; what is not attached is done. Raises CniError where the kernel refuses."""
        async with self._gate.passing():
            await self._detach(key, netns)

    async def work_off(self) -> None:
        """Do the DELs that no agent was there for. One that fails stays for the next time."""
        for key in self._env.spool.waiting():
            async with self._gate.passing(), self._locked(key.uid):
                if not self._env.spool.holds(key):
                    continue
                log.info("container %s was detached while no agent ran: removing its interface %s", *astuple(key))
                try:
                    await self._delete(key, None)
                except CniError as error:
                    log.warning("container %s: %s; left for later", key.container, error)

    async def check(self, request: CniRequest, netns: int | None) -> None:
        """Raises CniError that says what is not as it was left."""
        fd = self._open_netns(request.netns, netns)
        try:
            async with self._gate.passing(), self._locked(request.key.uid):
                record = self._records.get(request.key.uid)
                if record is None:
                    what = f"container {request.container} has no interface {request.ifname} in network {request.network}"
                    raise CniError(UNKNOWN_CONTAINER, what)
                if os.fstat(fd).st_ino != record.inode and not record.imported:
                    raise CniError(KERNEL_REFUSED, f"container {request.container} is in another namespace now")
                await self._check(request, record, fd)
        finally:
            os.close(fd)

    async def loopback(self, request: CniRequest, netns: int | None) -> CniResult | None:
        """The verbs of CNI's loopback plugin; needs no network, and keeps nothing. Raises CniError."""
        if request.command not in ("ADD", "CHECK"):
            return None
        fd = self._open_netns(request.netns, netns)
        try:
            return await serve_loopback(self._env.kernel, request, fd)
        finally:
            os.close(fd)

    async def collect(self, network: str, valid: frozenset[AttachmentKey]) -> None:
        """GC: detach what belongs to `network` and is not `valid`. Goes on after a failure; raises the first CniError."""
        errors: list[CniError] = []
        for record in self.records:
            if record.network == network and record.key not in valid:
                log.info("attachment %s of container %s is not valid any more: removed", record.ifname, record.container)
                try:
                    await self.delete(record.key)
                except CniError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def status(self) -> None:
        """Raises CniError (50, 51) while ADD cannot be served."""
        network = self._network_or(NOT_AVAILABLE)
        trouble = self._env.health.degraded.get("links")
        if trouble:
            raise CniError(NOT_AVAILABLE_LIMITED, "the node's links are not as they should be", trouble)
        withheld = self._env.reservations.withheld()
        if withheld:
            raise CniError(NOT_AVAILABLE, "no address can be given at present", withheld)
        for prefix in network.pod_cidrs:
            if not self._env.reservations.has_room(prefix):
                raise CniError(NOT_AVAILABLE, f"no address is free in {prefix}")

    # --- taking over ----------------------------------------------------------------------------------------------

    async def adoptable(self, network: NodeNetwork) -> list[EnginePod]:
        """The attachments that go on; their host ports are set."""
        found: list[EnginePod] = []
        observed = await self._env.kernel.observe()
        for record in self.records:
            ips = self.addresses(record)
            if self._is_dead(record, observed):
                continue
            if record.ports and ips:
                self._env.set_host_ports(record.uid, host_port_pod(record, ips))
            if record.chained or record.imported or not ips:
                continue
            try:
                found.append(EnginePod(attachment_of(record, network, ips), record.netns, record.inode))
            except ValueError as error:
                log.warning("container %s loses its interface %s: %s", record.container, record.ifname, error)
        return found

    async def sweep(self) -> int:
        """Free what belongs to namespaces that are no more; returns how many attachments that were."""
        async with self._gate.passing():
            return await self._sweep()

    async def _sweep(self) -> int:
        observed = await self._env.kernel.observe()
        gone = 0
        for record in self.records:
            if not self._is_dead(record, observed) or self._locked(record.uid).locked():
                continue
            log.info("container %s is no more and was never detached: freeing its interface", record.container)
            try:
                await self._detach(record.key)
            except CniError as error:
                log.warning("container %s: %s", record.container, error)
            else:
                gone += 1
        for key in tuple(self._unreleased.values()):
            await self._detach(key)
        return gone

    async def run(self) -> None:
        """Look for forgotten DELs and dead containers, once engines are served and from time to time, until cancelled."""
        await self._opened.wait()
        while True:
            self._look.clear()
            try:
                await self.work_off()
                await self.sweep()
            except (KernelError, OSError) as error:
                log.warning("looking for containers that are no more: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if self._unreleased else SWEEP_SECONDS):
                    await self._look.wait()

    def services_programmed(self) -> None:
        """What waited for the host's rules need not wait longer."""
        self._look.set()

    async def _detach(self, key: AttachmentKey, netns: int | None = None) -> None:
        async with self._locked(key.uid):
            await self._delete(key, netns)

    # --- inside: the attachment's lock is held --------------------------------------------------------------------

    async def _delete(self, key: AttachmentKey, netns: int | None) -> None:
        record = self._records.get(key.uid)
        if record is not None:
            await self._remove(record, netns)
        elif key.uid in self._unreleased and await self._ports_closed():
            await self._release(key)
        if key.uid not in self._unreleased:
            self._env.spool.forget(key)

    async def _add(self, request: CniRequest, fd: int) -> CniResult:
        record = self._new_record(request, fd)
        before = self._records.get(record.uid)
        again = before is not None and before.same_but_for_time(record)
        if record.ports and self._provisional and not again:
            raise CniError(TRY_LATER, "the API has not answered since the agent's start: host ports cannot be opened before")
        if before is not None and not again:
            # The engine never detached what had this name: an earlier life of the container, or other settings.
            await self._remove(before)
        record = before if before is not None and again else record
        for other in self._displaced(record):
            await self._detach(other.key)
        await self._claim_ports(record)
        try:
            ips = await self._reserve_or_sweep(record, request.ips)
            self._records[record.uid] = record
            if not record.chained:
                await self._link(record, ips, f"/proc/self/fd/{fd}")
            await self._program_ports(record, ips)
        except (PlumbingError, KernelError, CniError) as error:
            await self._remove(record)
            raise _refused(error) from error
        except AddressesExhausted as error:
            raise CniError(NO_ADDRESS, f"no address is free in {error.prefix}", error.details) from error
        except AddressTaken as error:
            raise CniError(NO_ADDRESS, str(error)) from error
        except sqlite3.Error as error:
            raise CniError(IO_FAILURE, "the reservation cannot be written to disk", str(error)) from error
        except PodwireError as error:
            raise CniError(TRY_LATER, str(error)) from error
        for listener in self._listeners:
            listener(record, ips)
        return result_of(record, self._network_or(TRY_LATER), ips) if request.previous is None else request.previous

    def _displaced(self, record: AttachmentRecord) -> list[AttachmentRecord]:
        """Whoever had this interface of this namespace before. The kernel gives a namespace's number to another one once it
        is gone, and engines give paths again: a container whose DEL was dropped then looks alive."""
        taken = (record.inode, record.ifname, record.chained)
        return [r for r in self.records if (r.inode, r.ifname, r.chained) == taken and r.uid != record.uid]

    def _new_record(self, request: CniRequest, fd: int) -> AttachmentRecord:
        inode = os.fstat(fd).st_ino
        now = self._env.clock().isoformat()
        record = record_of(request, Origin(now, self._env.boot, inode, _inode(request.netns) == inode))
        others = [r for r in self._records.values() if r.inode == inode and r.ifname != record.ifname and not r.chained]
        if any(r.default_routes for r in others):
            record = msgspec.structs.replace(record, default_routes=False)
        return record

    async def _reserve_or_sweep(self, record: AttachmentRecord, wanted: tuple[IPAddress, ...]) -> tuple[IPAddress, ...]:
        """An engine that forgets its DELs fills the range with containers that are no more."""
        try:
            return await self._reserve(record, wanted)
        except (AddressesExhausted, AddressTaken):
            if not await self._sweep():
                raise
        return await self._reserve(record, wanted)

    async def _reserve(self, record: AttachmentRecord, wanted: tuple[IPAddress, ...]) -> tuple[IPAddress, ...]:
        env, network = self._env, self._network_or(TRY_LATER)
        owner = Owner(record.uid, *record.title)
        prefixes = () if record.chained else network.pod_cidrs
        ips = await env.reservations.reserve(owner, prefixes, env.clock(), wanted=wanted, record=record.encode())
        self._unreleased.pop(record.uid, None)
        return ips or self.addresses(record)

    async def _link(self, record: AttachmentRecord, ips: tuple[IPAddress, ...], netns: str) -> None:
        plumbing = self._env.plumbing
        if record.uid in plumbing.pods:
            await plumbing.compare(record.uid, netns, repair=True)
        else:
            path = record.netns if record.visible else ""
            await plumbing.plumb(attachment_of(record, self._network_or(TRY_LATER), ips), netns, engine_path=path)

    async def _claim_ports(self, record: AttachmentRecord) -> None:
        """Raises CniError where another container has one of the host ports. One that is dead gives them up."""
        for holder in self._rivals(record):
            if self._is_dead(holder, await self._env.kernel.observe()) and not self._locked(holder.uid).locked():
                await self._detach(holder.key)
        for holder in self._rivals(record):
            wanted, held = set(occupied(record)), set(occupied(holder))
            ports = ", ".join(sorted({f"{p.port}/{p.protocol}" for p in wanted for q in held if p.clashes(q)}))
            raise CniError(INVALID_CONFIG, f"host port {ports} is in use by container {holder.container}")

    def _rivals(self, record: AttachmentRecord) -> Iterator[AttachmentRecord]:
        mine = tuple(occupied(record))
        for other in self.records if mine else ():
            clash = other.ports and any(port.clashes(held) for held in occupied(other) for port in mine)
            if clash and other.uid != record.uid:
                yield other

    async def _program_ports(self, record: AttachmentRecord, ips: tuple[IPAddress, ...]) -> None:
        if not record.ports or self._provisional:
            return
        self._env.set_host_ports(record.uid, host_port_pod(record, ips))
        try:
            async with asyncio.timeout(HOST_PORT_SECONDS):
                await self._env.host_ports_programmed()
        except TimeoutError:
            raise CniError(TRY_LATER, "the node's Service rules are not programmed yet, so host ports cannot be") from None

    async def _remove(self, record: AttachmentRecord, netns: int | None = None) -> None:
        env, uid = self._env, record.uid
        if record.ports:
            env.set_host_ports(uid, None)
        try:
            if record.imported and netns is not None:
                await env.plumbing.remove_foreign(uid, netns, record.ifname)
            elif not record.chained and not record.imported:
                await env.plumbing.unplumb(uid)
        except (PlumbingError, KernelError) as error:
            what = f"the interface of container {record.container} cannot be removed"
            raise CniError(KERNEL_REFUSED, what, str(error)) from error
        self._records.pop(uid, None)
        if record.ports and not await self._ports_closed():
            self._keep(record.key)
        else:
            await self._release(record.key)
        for listener in self._listeners:
            listener(record, None)

    async def _ports_closed(self) -> bool:
        """Whether no rule of the host leads any more to addresses that are to be free."""
        if not self._env.services_known():
            return False
        try:
            async with asyncio.timeout(CLOSING_SECONDS):
                await self._env.host_ports_programmed()
        except TimeoutError:
            return False
        return True

    async def _release(self, key: AttachmentKey) -> None:
        """Free the addresses. What the disk does not take now is tried again: it is no reason for an engine to keep asking."""
        try:
            await self._env.reservations.release(key.uid)
        except sqlite3.Error as error:
            log.warning("the end of attachment %s cannot be written to disk: %s; tried again later", key.uid, error)
            self._keep(key)
        else:
            self._unreleased.pop(key.uid, None)

    def _keep(self, key: AttachmentKey) -> None:
        """Free the addresses later. The spool, which seldom lies on the disk of the addresses, tells the next agent of it."""
        self._unreleased[key.uid] = key
        with contextlib.suppress(OSError):
            self._env.spool.keep(key)

    async def _check(self, request: CniRequest, record: AttachmentRecord, fd: int) -> None:
        if request.previous is not None and not record.imported:
            said = {ip.address.ip for ip in request.previous.ips}
            lost = [str(ip) for ip in self.addresses(record) if ip not in said]
            if lost and not record.chained:
                raise CniError(KERNEL_REFUSED, f"prevResult does not have the container's address {', '.join(lost)}")
        if record.chained or record.imported:
            return
        try:
            if record.uid not in self._env.plumbing.pods:
                raise CniError(KERNEL_REFUSED, f"the interface {record.ifname} of container {record.container} is gone")
            wrong = await self._env.plumbing.compare(record.uid, f"/proc/self/fd/{fd}", repair=False)
        except (PlumbingError, KernelError) as error:
            raise _refused(error) from error
        if wrong:
            raise CniError(KERNEL_REFUSED, f"container {record.container} is not attached as it was", "; ".join(wrong))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _is_dead(self, record: AttachmentRecord, observed: NetState) -> bool:
        """Whether the container's namespace is no more. A link of ours that stands proves that it is there, whatever
        became of its path."""
        if record.boot != self._env.boot:
            return True
        if record.imported or _inode(record.netns) == record.inode:
            return False
        return record.visible if record.chained else not link_stands(record.uid, observed)

    def _open_netns(self, path: str, fd: int | None) -> int:
        """A descriptor of our own. Raises CniError where neither leads to a namespace."""
        try:
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else os.dup(fd)
        except OSError as error:
            raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS {path!r} cannot be opened", error.strerror or "") from error
        if os.fstat(opened).st_dev != self._env.nsfs.stat().st_dev:
            os.close(opened)
            raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS {path!r} is not a network namespace")
        return opened

    def _network_or(self, code: int) -> NodeNetwork:
        if self._network is None:
            raise CniError(code, "the node has no subnet yet, or its network is not up")
        return self._network

    def _locked(self, uid: str) -> asyncio.Lock:
        lock = self._locks.get(uid)
        if lock is None:
            lock = self._locks[uid] = asyncio.Lock()
        return lock


def _refused(error: Exception) -> CniError:
    return error if isinstance(error, CniError) else CniError(KERNEL_REFUSED, "the container cannot be attached", str(error))


def _inode(path: str) -> int:
    """The identity of what is at `path`; 0 where there is nothing."""
    try:
        return Path(path).stat().st_ino if path else 0
    except OSError:
        return 0
