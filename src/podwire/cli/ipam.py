"""`podwire ipam`: which addresses of this node are whose."""

import ipaddress
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from podwire.cli.node import CNI_SOCKET, state_option
from podwire.cli.table import print_table
from podwire.model.errors import InvalidInput

if TYPE_CHECKING:
    from podwire.agent.book import Entry

_GC_SECONDS = 60.0
_AGENT = "agent"
"""The agent's own directory in the node's --state-dir."""
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(short_help="Which addresses of this node are whose.")
def ipam() -> None:
    """Which addresses of this node are whose: pods, and containers of engines. Run it on the node."""


@ipam.command("ls")
@state_option
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Output format.")
def list_reservations(state: Path, output: str) -> None:
    """List all reservations, the oldest first.

    With -o json: [{"address", "namespace", "name", "since", "uid", "container", "interface", "network"}, …]; the last three
    only for containers of engines.
    """
    from podwire.agent.book import read_book

    documents = [_document(entry) for entry in read_book(state / _AGENT).entries]
    if output == "json":
        click.echo(json.dumps(documents, indent=2))
        return
    rows = [["ADDRESS", "HOLDER", "SINCE", "CONTAINER", "INTERFACE"]]
    for d in documents:
        holder = f"{d['namespace']}/{d['name']}"
        rows.append([d["address"], holder, d["since"][:19], d.get("container", "")[:12], d.get("interface", "")])
    print_table(*rows)


@ipam.command(short_help="Say who holds an address, since when and for what.")
@click.argument("address")
@state_option
def explain(address: str, state: Path) -> None:
    """Say who holds ADDRESS, since when and for what; or why nobody can."""
    from podwire.agent.book import read_book

    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:
        raise click.BadParameter(f"{address!r} is not an IP address", param_hint="ADDRESS") from error
    click.echo(read_book(state / _AGENT).explain(parsed))


@ipam.command(short_help="Free the addresses of containers that are no more.")
@click.option("--cni-socket", type=click.Path(path_type=Path), default=CNI_SOCKET, show_default=True,
              help="Where the agent serves container engines.")  # fmt: skip
def gc(cni_socket: Path) -> None:
    """Free the addresses of containers that are no more and were never detached. The agent does it by itself every half
    minute, and when it starts; pods are never touched."""
    freed = _ask(cni_socket, "PODWIRE-COLLECT")["freed"]
    click.echo(f"{freed} attachment{'' if freed == 1 else 's'} freed")


@ipam.command("import", short_help="Take over the addresses that host-local has given to containers.")
@click.argument("folders", nargs=-1, type=_FOLDER, metavar="[FOLDER]...")
@click.option("--flannel", type=_FOLDER, metavar="FOLDER",
              help="Also the networks that flannel's CNI plugin was used for, by its own folder.")  # fmt: skip
@state_option
def take_over(folders: tuple[Path, ...], flannel: Path | None, state: Path) -> None:
    """Take over the addresses that host-local has given to containers which still run, so that none is given twice.

    FOLDER is that of one network, below /var/lib/cni/networks. The containers keep their links as they are until the engine
    detaches them, which then frees the address here. Nothing is written to FOLDER. The agent must not be running.
    """
    import asyncio

    from podwire.agent.takeover import flannel_networks

    found = [*folders, *(flannel_networks(flannel) if flannel else ())]
    if not found:
        raise click.UsageError("say what to take over: podwire ipam import /var/lib/cni/networks/NETWORK")
    count = asyncio.run(_take_over(found, state / _AGENT))
    click.echo(f"{count} address{'' if count == 1 else 'es'} taken over")


async def _take_over(folders: list[Path], state: Path) -> int:
    from podwire.agent.attachrecord import AttachmentRecord
    from podwire.agent.book import FILE_NAME
    from podwire.agent.nodelock import NodeLock
    from podwire.agent.registration import read_machine
    from podwire.agent.reservations import Owner, Reservations
    from podwire.agent.takeover import host_local_reservations

    try:
        os.makedirs(state, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InvalidInput(f"{state} cannot be made ({error.strerror}); say where the agent's --state-dir is") from error
    lock = NodeLock(state)
    book = Reservations(state / FILE_NAME)
    now, boot, count = datetime.now(UTC), read_machine().boot_id, 0
    try:
        for folder in folders:
            for address, network, key in host_local_reservations(folder):
                record = AttachmentRecord(
                    container=key.container,
                    ifname=key.ifname,
                    network=network,
                    since=now.isoformat(),
                    boot=boot,
                    imported=True,
                )
                await book.take_over(Owner(key.uid, *record.title), (address,), now, record.encode())
                count += 1
    finally:
        book.close()
        lock.close()
    return count


def _document(entry: "Entry") -> dict[str, Any]:
    held, attachment = entry.reservation, entry.attachment
    document: dict[str, Any] = {
        "address": str(held.address),
        "namespace": held.namespace,
        "name": held.name,
        "since": held.since,
        "uid": held.uid,
    }
    if attachment is not None:
        document |= {"container": attachment.container, "interface": attachment.ifname, "network": attachment.network}
    return document


def _ask(path: Path, verb: str) -> Any:
    from podwire.wire.cni import decode_answer, encode_frame

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(_GC_SECONDS)
            agent.connect(str(path))
            agent.sendall(encode_frame({"CNI_COMMAND": verb}, b""))
            agent.shutdown(socket.SHUT_WR)
            answer = b""
            while block := agent.recv(65536):
                answer += block
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInput(f"no agent serves {path} ({reason}): it frees what is dead by itself when it starts") from error
    return json.loads(decode_answer(answer)[1])
