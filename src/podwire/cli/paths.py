"""`podwire paths` and `podwire demo`: real packets along every path, and the report of them."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

import podwire
from podwire.cli.connect import ask_lab, with_client
from podwire.cli.lab import apply, await_lab, load, start, staying_up
from podwire.cli.options import lab_option, make_spec, spec_options
from podwire.cli.progress import Progress
from podwire.cli.signals import exit_on_signals
from podwire.lab.errors import LabError

if TYPE_CHECKING:
    from podwire.lab.state import LabDirectory

_OUTPUT = click.option(
    "-o", "output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True, help="Output format."
)


@click.command(short_help="Send real packets along the paths of a lab.")
@lab_option
@click.option("--pod", "source", default="", metavar="FROM",
              help="Where to send from: [NAMESPACE/]POD, a node's name, or `world`.")  # fmt: skip
@click.option("--to", "target", default="", metavar="TO",
              help="What to reach: [NAMESPACE/]POD, [NAMESPACE/]svc/NAME, or ADDRESS:PORT.")  # fmt: skip
@_OUTPUT
def paths(lab_name: str, source: str, target: str, output: str) -> None:
    """Send real packets along the paths of a lab and report what was seen.

    The report has a row for each path that the lab's objects make possible, with the hops as captured on the devices, the
    encapsulation, the rewritten addresses as the kernel's connection tracking has them, and the round trip. With --pod and
    --to: the way between these two.

    With -o json or yaml: {"paths": [{"path", "from", "to", "hops", "rtt_ms", "ok", "reason"}, …]}. Exit status 0 only if
    every path works.
    """
    if bool(source) != bool(target):
        raise click.UsageError("--pod and --to belong together: podwire paths --pod FROM --to TO")
    sys.exit(0 if print_report(probe(lab_name, source, target), output) else 1)


@click.command()
@spec_options("demo")
@click.option("--keep", is_flag=True, help="Leave the lab up, to go on with kubectl.")
@click.option("--timeout", type=click.FloatRange(min=0), default=120.0, show_default=True, metavar="SECONDS",
              help="How long the pods may take to be ready.")  # fmt: skip
@_OUTPUT
def demo(keep: bool, timeout: float, output: str, **options: Any) -> None:
    """Show all paths of the Kubernetes network with real packets.

    Brings up a lab of three nodes, applies the manifests in examples/shop, waits until all is ready, sends packets along
    every path, prints the report and takes the lab down; an interrupted or killed demo takes it down too. Exit status 0
    only if every path works.
    """
    from podwire.lab.launch import held_leash

    spec = make_spec(**options)
    progress = Progress()
    with exit_on_signals(), nullcontext() if keep else held_leash() as leash:
        documents = load([example("shop")])
        directory, record = start(spec, progress, leash)
        with staying_up(directory) if keep else _taken_down(directory, progress):
            apply(spec.name, documents, progress)
            await_lab(spec.name, timeout, progress)
            with progress.step("packets sent along every path"):
                report = probe(spec.name)
    good = print_report(report, output)
    if keep:
        click.echo(f"the lab stays up as pid {record.pid}: export KUBECONFIG={directory.kubeconfig}", err=True)
    sys.exit(0 if good else 1)


@contextmanager
def _taken_down(directory: "LabDirectory", progress: Progress) -> Iterator[None]:
    try:
        yield
    finally:
        with progress.step(f"lab {directory.name}: taken down"), suppress(LabError):
            directory.end()
            directory.remove()


def example(name: str) -> Path:
    """The directory of an example's manifests. Raises LabError when this installation has none."""
    source_tree = Path(podwire.__file__).resolve().parents[2] / "examples" / name
    if not source_tree.is_dir():
        raise LabError(
            f"the example {name} is not installed with podwire: run from a checkout, or `podwire lab up -f` your own"
        )
    return source_tree


def probe(lab_name: str, source: str = "", target: str = "") -> Any:
    """The paths report of a lab, as its document."""
    query = "?" + urlencode({"pod": source, "to": target}) if source else ""
    return json.loads(with_client(lab_name, lambda client: ask_lab(client, "POST", f"/lab/v1/paths{query}")))


def print_report(report: Any, output: str) -> bool:
    """Print it; returns whether every path works."""
    from podwire.lab.report import all_ok, lines, summary

    if output == "json":
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    elif output == "yaml":
        import yaml

        click.echo(yaml.safe_dump(report, sort_keys=False, allow_unicode=True), nl=False)
    else:
        for line in lines(report):
            click.echo(line)
        click.echo(f"\n{summary(report)}")
    return all_ok(report)
