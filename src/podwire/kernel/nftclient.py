"""nftables over one netlink socket: commit a transaction, read a table back. Blocking; `LinuxKernel` calls it off the loop."""

import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from podwire.kernel.exchange import RECEIVE_BYTES, Exchange
from podwire.kernel.port import KernelError
from podwire.model.addr import Family
from podwire.model.nft import (
    AddChain,
    Afterwards,
    Batch,
    ChainState,
    Data,
    DelElements,
    DelTable,
    NftSet,
    Prune,
    Rule,
    Ruleset,
    SetRules,
    SetState,
    Sweep,
    TableRef,
    TableState,
)
from podwire.wire import netlink, nftables
from podwire.wire.netlink import Ack, Message
from podwire.wire.nftables import HeldChains, Unit

_DUMP_ATTEMPTS = 20
_DELETE_ATTEMPTS = 20
_SWEEPS = 3
_LOOKUPS, _LOOKUP_BYTES = 64, 1 << 14
"""Requests in one datagram: their answers have to fit the receive buffer."""
_SO_SNDBUFFORCE = 32
"""asm-generic/socket.h; Python's socket module lacks it."""
_SNDBUF_MARGIN = 1024
"""The kernel refuses a datagram larger than its send buffer less 32 bytes; BEGIN and END come on top of the units."""
_MOST_BYTES = 1 << 19
"""Of one transaction, unless told otherwise. Until its end, and where anyone listens for changes, the kernel keeps 4 KiB for
every element: with 600,000 that is three times the work of getting the memory once and using it again."""

Counts = tuple[int, int]
"""(packets, bytes)."""


class NftClient:
    """One namespace's nftables. `sock` is a bound NETLINK_NETFILTER socket opened there, with extended acks; it stays the
    caller's to close. `most_bytes`: no transaction shall be larger, even if the send buffer takes more. Not for use by two
    threads at once."""

    def __init__(self, sock: socket.socket, *, most_bytes: int = _MOST_BYTES) -> None:
        self._sock, self._most_bytes = sock, most_bytes
        self._exchange = Exchange(sock, "nftables")
        self._may_force = True

    def commit(self, batch: Batch) -> None:
        """Execute the batch in one transaction; all of it or nothing.

        A large one goes in several, cut where each step is safe; one that makes a table anew only if it is larger than the send
        buffer may become (a user namespace may not raise it above net.core.wmem_max). Raises KernelError that names the command
        which the kernel refused."""
        units = list(nftables.encode_batch(batch, self._held_chains(batch)))
        anew = any(isinstance(c, DelTable) for c in batch.commands)
        for group in self._groups(units, whole=anew):
            self._transact(group)
        for command in batch.commands:
            if isinstance(command, Prune):
                self._prune(command)
            elif isinstance(command, Sweep):
                self._delete(command, lambda c=command: self.lookup(c.table, c.set, c.keys))  # type: ignore[misc]

    def observe(self, table: str) -> Ruleset:
        """The tables of that name in both families, from one moment. Dynamic sets come without their elements."""
        for _ in range(_DUMP_ATTEMPTS):
            generation = self._generation()
            refs = (TableRef(family, table) for family in Family)
            found = [(ref, self._ask(nftables.table_request(ref, 0))[0]) for ref in refs]
            tables = {ref: self._read_table(ref, nftables.decode_dormant(told)) for ref, told in found if told is not None}
            if self._generation() == generation:
                return Ruleset(tables)
        raise KernelError(f"nftables changed during each of {_DUMP_ATTEMPTS} readings", errno.EAGAIN)

    def elements(self, table: TableRef, set_name: str) -> dict[bytes, tuple[Data, Counts]]:
        """A set's elements with their counters (zeros where the set has none), dynamic ones too. Raises KernelError: ENOENT."""
        request = nftables.dump_request(nftables.GETSETELEM, table, 0, set_name=set_name)
        found = (element for msg in self._exchange.dump(request) for element in nftables.decode_elements(msg))
        return {key: (data, counts) for key, data, counts in found}

    def lookup(self, table: TableRef, of: NftSet, keys: Sequence[bytes]) -> dict[bytes, Data]:
        """Those elements of a set that are there. Costs a request each; `observe` is cheaper for most of a large set."""
        found: dict[bytes, Data] = {}
        for group in netlink.chunks(nftables.element_requests(table, of, keys), max_bytes=_LOOKUP_BYTES, max_count=_LOOKUPS):
            batch = self._exchange.execute(group)
            for ack in batch.errors.values():
                if ack.errno != errno.ENOENT:
                    raise KernelError(f"reading nftables: {ack.message or os.strerror(ack.errno)}", ack.errno)
            for answer in batch.answers.values():
                found |= {key: data for key, data, _ in nftables.decode_elements(answer)}
        return found

    # --- transactions -----------------------------------------------------------------------------------------

    def _held_chains(self, batch: Batch) -> HeldChains:
        """What the chains hold whose rules the batch changes; not of those that it makes first."""
        made = {(c.table, c.chain.name) for c in batch.commands if isinstance(c, AddChain)}
        changed = {(c.table, c.chain) for c in batch.commands if isinstance(c, SetRules) and c.rules}
        requests = {place: nftables.dump_request(nftables.GETRULE, place[0], 0, chain=place[1]) for place in changed - made}
        return {
            place: [held for _, _, held in map(nftables.decode_rule, self._exchange.dump(request))]
            for place, request in requests.items()
        }

    def _groups(self, units: Sequence[Unit], *, whole: bool = False) -> Iterator[list[Unit]]:
        """What goes in one transaction each. `whole`: in as few as the send buffer allows."""
        wanted = sum(u.size for u in units)
        if not whole:
            wanted = min(wanted, self._most_bytes)
        return _cut(units, min(wanted, self._room(wanted)))

    def _room(self, wanted: int) -> int:
        """How many bytes of units may go in one transaction; raises the send buffer as far as is allowed and needed."""
        room = self._capacity()
        if wanted > room and self._may_force:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, wanted + _SNDBUF_MARGIN)
            except OSError:  # no CAP_NET_ADMIN in the initial user namespace
                self._may_force = False
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted + _SNDBUF_MARGIN)
            room = self._capacity()
        return room

    def _capacity(self) -> int:
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _SNDBUF_MARGIN

    def _transact(self, units: Sequence[Unit]) -> None:
        first = self._exchange.number(2 + sum(len(u.messages) for u in units))
        self._exchange.send(nftables.frame(units, first))
        # The kernel works within send(): what it has to say is there already, and it says nothing of what went well.
        refusals = sorted((ack for ack in self._waiting() if ack.errno), key=lambda ack: ack.seq)
        if refusals:
            raise _refused(units, first, refusals[0])

    def _waiting(self) -> Iterator[Ack]:
        while True:
            try:
                datagram = self._sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                # ENOBUFS: so many refusals that they did not fit the receive buffer.
                raise KernelError(f"nftables refused the transaction: {error.strerror}", error.errno or 0) from error
            yield from (netlink.parse_ack(m) for m in netlink.parse_messages(datagram) if m.type == netlink.NLMSG_ERROR)

    def _prune(self, command: Prune) -> None:
        length = command.part_length

        def unwanted() -> Iterator[bytes]:
            found = self.elements(command.table, command.set.name)
            return (key for key, (data, _) in found.items() if command.unwanted(key, data, length))

        self._delete(command, unwanted)

    def _delete(self, command: Afterwards, find: Callable[[], Iterable[bytes]]) -> None:
        """Delete what `find` finds in a set that packets change, until it finds nothing: a packet that the rules before the
        transaction had in hand may come back to it. `_SWEEPS` times at most, for what comes for ever is not such a one."""
        sweeps = 0
        for _ in range(_DELETE_ATTEMPTS):
            gone = tuple((key, None) for key in find())
            if not gone:
                return
            units = list(nftables.encode_batch(Batch((DelElements(command.table, command.set, gone),))))
            try:
                for group in self._groups(units):
                    self._transact(group)
                sweeps += 1
                if sweeps == _SWEEPS:
                    return
            except KernelError as error:
                if error.errno != errno.ENOENT:  # ENOENT: one expired since it was read
                    raise
        raise KernelError(f"nftables set {command.set.name} changed during each of {_DELETE_ATTEMPTS} attempts", errno.EAGAIN)

    # --- reading ----------------------------------------------------------------------------------------------

    def _generation(self) -> bytes:
        request = netlink.message(nftables.SUBSYSTEM << 8 | nftables.GETGEN, netlink.NLM_F_REQUEST, 0, b"\0\0\0\0")
        answer, _ = self._ask(request)
        return netlink.parse_attrs(answer.payload, 4)[1] if answer else b""

    def _read_table(self, ref: TableRef, dormant: bool) -> TableState:
        chains: dict[str, ChainState] = {}
        rules: dict[str, list[Rule]] = {}
        for msg in self._exchange.dump(nftables.dump_request(nftables.GETCHAIN, ref, 0)):
            table, chain = nftables.decode_chain(msg)
            if table == ref.name:
                chains[chain.name] = ChainState(chain)
        for msg in self._exchange.dump(nftables.dump_request(nftables.GETRULE, ref, 0)):
            table, chain_name, held = nftables.decode_rule(msg)
            if table == ref.name:
                rules.setdefault(chain_name, []).append(held.rule)
        chains |= {n: ChainState(chains[n].chain, tuple(found)) for n, found in rules.items() if n in chains}
        return TableState(chains, self._read_sets(ref), dormant)

    def _read_sets(self, ref: TableRef) -> Mapping[str, SetState]:
        decoded = (nftables.decode_set(msg) for msg in self._exchange.dump(nftables.dump_request(nftables.GETSET, ref, 0)))
        sets: list[NftSet] = [of for table, of in decoded if table == ref.name and of is not None]
        return {of.name: SetState(of, self._plain_elements(ref, of) if of.key and not of.dynamic else {}) for of in sets}

    def _plain_elements(self, ref: TableRef, of: NftSet) -> dict[bytes, Data]:
        request = nftables.dump_request(nftables.GETSETELEM, ref, 0, set_name=of.name)
        return {key: data for msg in self._exchange.dump(request) for key, data, _ in nftables.decode_elements(msg)}

    def _ask(self, request: bytes) -> tuple[Message | None, int]:
        """One object → (its message or None, errno). Errors other than "no such object" raise."""
        seq = self._exchange.number(1)
        self._exchange.send(netlink.with_seq(request, seq))
        while True:
            for msg in netlink.parse_messages(self._exchange.receive()):
                if msg.seq != seq:
                    continue
                if msg.type != netlink.NLMSG_ERROR:
                    return msg, 0
                ack = netlink.parse_ack(msg)
                if ack.errno not in (0, errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                    raise KernelError(f"reading nftables: {ack.message or os.strerror(ack.errno)}", ack.errno)
                return None, ack.errno


def _cut(units: Sequence[Unit], room: int) -> Iterator[list[Unit]]:
    """Groups of units, in order, each below `room` bytes; a unit that is larger alone goes alone."""
    group: list[Unit] = []
    size = 0
    for unit in units:
        if group and size + unit.size > room:
            yield group
            group, size = [], 0
        group.append(unit)
        size += unit.size
    if group:
        yield group


_COMMAND_SHOWN = 400


def _refused(units: Sequence[Unit], first_seq: int, ack: Ack) -> KernelError:
    messages = [unit.command for unit in units for _ in unit.messages]
    index = ack.seq - first_seq - 1
    reason = ack.message or os.strerror(ack.errno)
    if 0 <= index < len(messages):
        command = str(messages[index])
        shown = command if len(command) <= _COMMAND_SHOWN else command[:_COMMAND_SHOWN] + "…"
        return KernelError(f"nftables refused `{shown}`: {reason}", ack.errno)
    return KernelError(f"nftables refused the transaction: {reason}", ack.errno)
