"""`podwire verify`: hold what should be, what is programmed and what packets do against each other."""

import json
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from podwire.cli.annotationprefix import annotation_prefix
from podwire.cli.connect import with_client
from podwire.cli.options import lab_option

if TYPE_CHECKING:
    from podwire.client.api import ApiClient


@click.group()
def verify() -> None:
    """Prove that the network is what it should be."""


@verify.command()
@lab_option
@click.option("--etcd-endpoints", default=None, metavar="URLS",
              help="Verify this host instead of a lab, against the leases in this etcd; several with commas.")  # fmt: skip
@click.option("--etcd-prefix", default="/coreos.com/network", show_default=True, metavar="KEY", help="Where they are in it.")
@click.option("--etcd-cafile", default="", metavar="FILE", help="CA certificates that etcd's is checked with.")
@click.option("--etcd-certfile", default="", metavar="FILE", help="This client's TLS certificate.")
@click.option("--etcd-keyfile", default="", metavar="FILE", help="This client's TLS key.")
@click.option("--etcd-username", default="", metavar="NAME", help="etcd user.")
@click.option("--etcd-password", default="", metavar="WORD", envvar="FLANNELD_ETCD_PASSWORD",
              help="Its password; better given as FLANNELD_ETCD_PASSWORD.")  # fmt: skip
@click.option("--kubeconfig-file", default=None, metavar="FILE", type=click.Path(path_type=Path),
              help="Verify this host instead of a lab, against the Nodes of this API server.")  # fmt: skip
@click.option("--kube-annotation-prefix", default="flannel.alpha.coreos.com", show_default=True, metavar="PREFIX",
              callback=annotation_prefix, help="Of the annotations on those Nodes.")  # fmt: skip
@click.option("--node-name", default="", metavar="NAME", help="Which Node or lease is this host's. "
              "[default: the one with its address]")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Show the evidence of what is right, too.")
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Output format.")
def overlay(lab_name: str, everything: bool, output: str, **store: Any) -> None:
    """Verify the three conditions of the overlay, and its path MTU.

    Every pod address belongs to one node, and every node's kernel agrees (route, neighbour, forwarding entry, the device's MAC
    there, against the leases); no subnet or address is held twice; a packet keeps its source from pod to pod (sent and
    watched); between each pair of nodes a packet of the device's MTU arrives, and one byte more does not leave.

    For a lab, or, with --etcd-endpoints or --kubeconfig-file, for this host and its ways to all others.

    With -o json: {"ok", "findings": [{"condition", "subject", "ok", "evidence"}, …]}; "ok" is null for what could not be looked
    at, which the evidence explains. Exit status 0 only if nothing is wrong.
    """
    _fit_together(click.get_current_context())
    if store["etcd_endpoints"] is not None or store["kubeconfig_file"]:
        report = _this_host(store)
    else:

        async def ask(client: "ApiClient") -> bytes:
            return await client.request("POST", "/lab/v1/verify/overlay")

        report = json.loads(with_client(lab_name, ask))
    click.echo(json.dumps(report, indent=2, ensure_ascii=False) if output == "json" else text_of(report, everything=everything))
    sys.exit(0 if report["ok"] else 1)


_BELONGS_TO = {
    "etcd_endpoints": ("etcd_prefix", "etcd_cafile", "etcd_certfile", "etcd_keyfile", "etcd_username", "etcd_password"),
    "kubeconfig_file": ("kube_annotation_prefix",),
}
"""Which options mean something only beside which other."""


def _fit_together(ctx: click.Context) -> None:
    """Whoever says where to look is never answered about something else. Raises UsageError."""
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    stores = given & _BELONGS_TO.keys()
    if len(stores) > 1:
        raise click.UsageError("--etcd-endpoints and --kubeconfig-file are two places where leases may be: give one of them")
    if stores and "lab_name" in given:
        raise click.UsageError(f"--name is for a lab, {_option(*stores)} for this host: give one of them")
    if not stores and "node_name" in given:
        raise click.UsageError("--node-name is for this host: add --etcd-endpoints or --kubeconfig-file")
    for store, names in _BELONGS_TO.items():
        if store not in given and (odd := [name for name in names if name in given]):
            raise click.UsageError(f"{_option(odd[0])} has no effect without {_option(store)}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _this_host(store: Mapping[str, Any]) -> Any:
    import asyncio

    from podwire.cli.verifyhost import read_store
    from podwire.lab.verify import document
    from podwire.lab.verifyhost import verify_host

    async def run() -> Any:
        known = await read_store(store)
        return document(await verify_host(known.leases, store["node_name"], known.pods))

    return asyncio.run(run())


def text_of(report: Any, *, everything: bool) -> str:
    """The conditions in order, each with what is wrong or not known (`everything`: and what is right), and of how much."""
    lines = []
    for condition, group in groupby(sorted(report["findings"], key=lambda f: str(f["condition"])), lambda f: f["condition"]):
        findings = list(group)
        right = [f for f in findings if f["ok"]]
        known = [f for f in findings if f["ok"] is not None]
        worst = None if not known else len(right) == len(known)
        lines.append(f"{_MARKS[worst]} {condition}: {len(right)} of {len(known)}")
        shown = (f for f in findings if everything or not f["ok"])
        lines += [f"    {_MARKS[f['ok']]} {f['subject']}: {f['evidence']}" for f in shown]
    return "\n".join(lines)


_MARKS = {True: "✓", False: "✗", None: "–"}
