"""`podwire lab fault`: break a running lab on purpose, and heal it."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import click

from podwire.cli.connect import with_client
from podwire.cli.options import lab_option

if TYPE_CHECKING:
    from podwire.client.api import ApiClient


@click.group(short_help="Break a lab on purpose, and heal it.")
def fault() -> None:
    """Break a lab on purpose: cut and slow cables, stop machines, remove what agents programmed; and heal it.

    Faults stay until `podwire lab fault heal`; several may be in force. NODE is a node's name; PLACE also `world`,
    `balancer`, `api` (API server and controllers), and the etcd members of a lab that has them (etcd-1, …).
    """


@fault.command()
@lab_option
@click.argument("places", nargs=-1, required=True, metavar="PLACE…")
@click.option("--from", "others", multiple=True, metavar="PLACE", help="Cut them off from these alone (may be repeated). "
              "[default: from everybody else]")  # fmt: skip
def partition(lab_name: str, places: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Cut places off: nothing arrives from, or at, the other side.

    Example: podwire lab fault partition node-1 node-2 --from node-3
    """
    _add(lab_name, "partition", places, others=list(others))


@fault.command()
@lab_option
@click.argument("places", nargs=-1, required=True, metavar="PLACE…")
@click.option("--percent", type=click.FloatRange(0, 100, min_open=True), required=True, help="How many packets are lost.")
def drop(lab_name: str, places: tuple[str, ...], percent: float) -> None:
    """Lose a part of the packets that arrive at places."""
    _add(lab_name, "drop", places, amount=percent)


@fault.command()
@lab_option
@click.argument("places", nargs=-1, required=True, metavar="PLACE…")
@click.option("--ms", type=click.FloatRange(0, 60_000, min_open=True), required=True, metavar="MILLISECONDS",
              help="How much longer a packet takes, each way.")  # fmt: skip
def delay(lab_name: str, places: tuple[str, ...], ms: float) -> None:
    """Delay all packets to and from places. Needs the kernel's netem queue (module sch_netem)."""
    _add(lab_name, "delay", places, amount=ms)


@fault.command(short_help="Stop machines, or members of etcd, as when the power fails.")
@lab_option
@click.argument("machines", nargs=-1, required=True, metavar="NODE…")
def stop(lab_name: str, machines: tuple[str, ...]) -> None:
    """Stop machines: a node's agent ends and its cable goes dead; of an etcd member, the process is killed."""
    _add(lab_name, "stop", machines)


@fault.command(short_help="Kill agents; each is started again at once.")
@lab_option
@click.argument("nodes", nargs=-1, required=True, metavar="NODE…")
def kill(lab_name: str, nodes: tuple[str, ...]) -> None:
    """Kill agents; each is started again at once, and adopts what it finds."""
    for node in nodes:
        _call(lab_name, "POST", f"/lab/v1/nodes/{quote(node, safe='')}/restart")
        click.echo(f"the agent of {node} was killed and runs again")


@fault.command()
@lab_option
@click.argument("node")
@click.argument("what", nargs=-1, required=True)
def remove(lab_name: str, node: str, what: tuple[str, ...]) -> None:
    """Remove what a node's agent has programmed, as a stranger would.

    WHAT is routes, neighbours, fdb, rules, switches, devices, or a device (flannel.1, cni0). The agent puts it back;
    `podwire lab logs` shows what it says.
    """
    for thing in what:
        answer = _call(lab_name, "DELETE", f"/lab/v1/nodes/{quote(node, safe='')}/{quote(thing, safe='')}")
        click.echo(f"{answer['removed']} removed from {node}: {thing}")


@fault.command()
@lab_option
@click.argument("places", nargs=-1, metavar="[PLACE]…")
def heal(lab_name: str, places: tuple[str, ...]) -> None:
    """End the faults that concern places; without any, all."""
    query = "?" + urlencode([("place", place) for place in places]) if places else ""
    click.echo(f"{_call(lab_name, 'DELETE', '/lab/v1/faults' + query)['healed']} faults healed")


@fault.command("ls")
@lab_option
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Output format.")
def list_faults(lab_name: str, output: str) -> None:
    """List the faults in force.

    With -o json: a list of objects with kind, places, others, amount (percent or milliseconds) and text.
    """
    faults = _call(lab_name, "GET", "/lab/v1/faults")
    click.echo(json.dumps(faults, indent=2) if output == "json" else "\n".join(f["text"] for f in faults) or "none")


def _add(lab_name: str, kind: str, places: Sequence[str], **more: Any) -> None:
    answer = _call(lab_name, "POST", "/lab/v1/faults", {"kind": kind, "places": list(places), **more})
    click.echo(answer["text"])


def _call(lab_name: str, method: str, path: str, body: Any = None) -> Any:
    async def call(client: "ApiClient") -> bytes:
        return await client.request(method, path, body=body)

    return json.loads(with_client(lab_name, call) or b"{}")
