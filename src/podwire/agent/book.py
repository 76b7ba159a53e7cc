"""The record of address reservations as anyone may read it while the agent works with it."""

import ipaddress
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from podwire.agent.attachrecord import AttachmentRecord, decode_record
from podwire.agent.reservations import Reservation
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.errors import InvalidInput
from podwire.plan.ipam import gateway, pod_range

FILE_NAME = "reservations.db"


@dataclass(frozen=True, slots=True)
class Entry:
    """One reservation, and the attachment that has it, where a container engine asked for it."""

    reservation: Reservation
    attachment: AttachmentRecord | None


@dataclass(frozen=True, slots=True)
class Book:
    """All of one node's, by age. `prefixes`: the subnets out of which addresses were given."""

    entries: tuple[Entry, ...]
    prefixes: tuple[IPNetwork, ...]

    def explain(self, address: IPAddress) -> str:
        """What is known of an address, as sentences."""
        for entry in self.entries:
            if entry.reservation.address == address:
                return _holder(entry)
        prefix = next((prefix for prefix in self.prefixes if address in prefix), None)
        if prefix is None:
            known = ", ".join(map(str, self.prefixes)) or "none yet"
            return f"{address} is none of this node's: its subnets are {known}."
        first, last = pod_range(prefix)
        if address == gateway(prefix):
            return f"{address} is the gateway of {prefix}: the bridge's own address."
        if not first <= int(address) <= last:
            return f"{address} is never given: it is the subnet's own address, or the broadcast address, of {prefix}."
        held = sum(entry.reservation.address in prefix for entry in self.entries)
        return f"{address} is free: {held} of the {last - first + 1} addresses of {prefix} are held."


def read_book(state_dir: Path) -> Book:
    """Raises InvalidInput where there is none."""
    path = state_dir / FILE_NAME
    if not path.exists():
        raise InvalidInput(f"there is no record of reservations in {state_dir}: is that the agent's --state-dir?")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT address, uid, namespace, name, since FROM reservation").fetchall()
        records = {uid: decode_record(raw) for uid, raw in db.execute("SELECT uid, record FROM attachment")}
        prefixes = tuple(ipaddress.ip_network(row[0]) for row in db.execute("SELECT prefix FROM last_given ORDER BY prefix"))
    held = [Reservation(ipaddress.ip_address(row[0]), *row[1:]) for row in rows]
    held.sort(key=lambda r: (r.since, r.address.version, int(r.address)))
    return Book(tuple(Entry(r, records.get(r.uid)) for r in held), prefixes)


def _holder(entry: Entry) -> str:
    held, attachment = entry.reservation, entry.attachment
    text = f"{held.address} is held by {held.namespace}/{held.name} since {held.since}"
    if attachment is None:
        return f"{text}: a pod with uid {held.uid}."
    text += f": interface {attachment.ifname} of container {attachment.container} in network {attachment.network}"
    if attachment.imported:
        return f"{text}, taken over from another plugin. It is freed by the container's DEL."
    text += f", in namespace {attachment.netns}"
    try:
        there = Path(attachment.netns).stat().st_ino == attachment.inode
    except OSError:
        there = False
    if there:
        return f"{text}, which exists."
    unseen = "which this command does not see; the agent did not either" if not attachment.visible else "which is gone"
    return f"{text}, {unseen}. `podwire ipam gc` frees it if the container's link is gone too."
