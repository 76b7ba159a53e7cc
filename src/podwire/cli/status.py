"""`podwire status services` and `podwire wait --programmed`: what nodes say they have read back from their kernels."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from podwire.cli.connect import with_client, with_kubeconfig
from podwire.cli.options import lab_option
from podwire.cli.table import print_table

if TYPE_CHECKING:
    from podwire.client.api import ApiClient

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def _cluster_options(function: F) -> F:
    function = click.option(
        "--kubeconfig",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Any cluster whose nodes run podwire, instead of a lab.",
    )(function)
    return lab_option(function)


@click.group()
def status() -> None:
    """Show what is programmed where."""


@status.command("services")
@_cluster_options
@click.option("-n", "--namespace", metavar="NAMESPACE", default="", help="Only those in this namespace. [default: all]")
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Output format.")
def status_services(lab_name: str, kubeconfig: Path | None, namespace: str, output: str) -> None:
    """Show on which nodes each Service is programmed.

    A node says so in the API once it has read the rules of the Service's present version, and of its EndpointSlices', back
    from its kernel, and again every minute. One that may not know yet of a slice that was removed is late, and so is one that
    has not said anything for five minutes, or since it was started anew. Exit status 1 while a ready node is late.

    With -o json: a list of objects with namespace, name, programmed, late, absent (names of nodes), at (the latest word),
    why (empty, or why no node programs it) and silent (of those whose word counts no more: the reason).
    """
    from podwire.cli.programmed import read_all

    rows = _with(lab_name, kubeconfig, lambda client: read_all(client, namespace))
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        _print(rows)
    else:
        click.echo(f"no Services in namespace {namespace}" if namespace else "no Services", err=True)
    sys.exit(1 if any(row["late"] for row in rows) else 0)


@click.command(short_help="Wait until every ready node has programmed a Service.")
@_cluster_options
@click.option("--programmed", "service", required=True, metavar="SERVICE", help="svc/NAME, service/NAME or NAME.")
@click.option("-n", "--namespace", metavar="NAMESPACE", default="default", show_default=True, help="The Service's namespace.")
@click.option(
    "--timeout", type=click.FloatRange(0), default=30.0, show_default=True, metavar="SECONDS", help="How long at most."
)
def wait(lab_name: str, kubeconfig: Path | None, service: str, namespace: str, timeout: float) -> None:
    """Wait until every ready node has a Service, as it is now, in its kernel.

    Example: podwire wait --programmed svc/web

    Exit status 1, with the names of the nodes that are late, when the time is over.
    """
    from podwire.cli.programmed import wait_programmed

    kind, slash, name = service.rpartition("/")
    if not name:
        raise click.UsageError("--programmed takes the name of a Service, as svc/NAME")
    if slash and kind not in ("svc", "service", "services"):
        raise click.UsageError(f"{kind} cannot be waited for: --programmed takes a Service, as svc/NAME")
    click.echo(_with(lab_name, kubeconfig, lambda client: wait_programmed(client, namespace, name, timeout)))


def _with(lab_name: str, kubeconfig: Path | None, work: "Callable[[ApiClient], Any]") -> Any:
    return with_client(lab_name, work) if kubeconfig is None else with_kubeconfig(kubeconfig, work)


def _print(rows: list[dict[str, Any]]) -> None:
    table = [["NAMESPACE", "SERVICE", "PROGRAMMED", "LATE", "NOT READY"]]
    for row in rows:
        done = f"{len(row['programmed'])}/{len(row['programmed']) + len(row['late'])}" if not row["why"] else row["why"]
        table.append([row["namespace"], row["name"], done, ", ".join(row["late"]), ", ".join(row["absent"])])
    print_table(*table)
    silent = {name: why for row in rows for name, why in row["silent"].items()}
    for name, why in sorted(silent.items()):
        click.echo(f"node {name} {why}", err=True)
