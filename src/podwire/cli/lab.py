"""`podwire lab`: bring labs up and down, look into them, change them."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from podwire.cli.connect import ask_lab, lab_directory, with_client
from podwire.cli.fault import fault
from podwire.cli.options import files_option, lab_option, make_spec, name_argument, spec_options
from podwire.cli.progress import Progress, counted
from podwire.cli.table import print_table
from podwire.lab.errors import LabError
from podwire.lab.spec import LAB_MODES, MAX_NODES
from podwire.model.errors import PodwireError

if TYPE_CHECKING:
    from podwire.client.api import ApiClient
    from podwire.lab.spec import LabSpec
    from podwire.lab.state import LabDirectory, LabRecord
    from podwire.lab.targets import Target


@click.group(short_help="Clusters of emulated nodes on this machine.")
def lab() -> None:
    """Labs: clusters of emulated nodes on this machine, with real packets.

    A lab is one process with namespaces of its own. Ending that process removes everything, and nothing in a lab reaches
    the machine's network. Use it with kubectl: `export KUBECONFIG=$(podwire lab kubeconfig --path)`.
    """


@lab.command()
@spec_options("default")
@files_option
@click.option("--wait", is_flag=True, help="Return only when all pods are ready.")
@click.option("--timeout", type=click.FloatRange(min=0), default=120.0, show_default=True, metavar="SECONDS",
              help="How long --wait waits.")  # fmt: skip
def up(files: tuple[Path, ...], wait: bool, timeout: float, **options: Any) -> None:
    """Bring a lab up.

    Returns when all nodes are ready. Example: podwire lab up --nodes 5 -f shop.yaml --wait
    """
    spec = make_spec(**options)
    progress = Progress()
    documents = load(files)
    directory, record = start(spec, progress)
    with staying_up(directory):
        apply(spec.name, documents, progress)
        if wait:
            await_lab(spec.name, timeout, progress)
    click.echo(f"lab {record.name} is up: {counted(spec.nodes, 'node')}, API server https://127.0.0.1:{record.port}")
    click.echo(f"export KUBECONFIG={directory.kubeconfig}")


def start(spec: "LabSpec", progress: Progress, leash: int | None = None) -> "tuple[LabDirectory, LabRecord]":
    """Start a lab, which ends with its leash (`podwire.lab.launch`) if it has one. Raises LabError."""
    from podwire.lab.launch import start_lab

    directory = lab_directory(spec.name)
    lock = directory.create()  # a name that is taken is no step that failed
    with progress.step(f"lab {spec.name}: {counted(spec.nodes, 'node')} ready"):
        return directory, start_lab(directory, lock, spec, lambda step: progress.note(step.name), leash)


@contextmanager
def staying_up(directory: "LabDirectory") -> Iterator[None]:
    """What fails in here leaves the lab up, to look into; the error says so."""
    try:
        yield
    except PodwireError as error:
        if not directory.alive:
            raise
        raise LabError(f"{error}; the lab is up: `podwire lab down {directory.name}` takes it down") from error


def apply(name: str, documents: Sequence[Any], progress: Progress) -> None:
    """Apply what `load` returned to the lab of this name. Raises PodwireError when something is not accepted."""
    if not documents:
        return
    from podwire.lab.manifests import apply_manifests

    with progress.step(f"{counted(len(documents), 'object')} applied"):
        with_client(name, lambda client: apply_manifests(client, documents))


def load(files: Sequence[Path]) -> Sequence[Any]:
    """Read manifests: before anything is started, so that broken ones cost nothing. Raises InvalidInput."""
    if not files:
        return ()
    from podwire.lab.manifests import load_manifests

    return load_manifests(files)


def await_lab(name: str, timeout: float, progress: Progress) -> None:
    """Wait until everything in the lab is ready, and every node has programmed it. Raises LabError after `timeout` seconds."""
    from podwire.lab.readiness import await_ready

    def show(obstacles: Sequence[str]) -> None:
        progress.note(f"waiting: {obstacles[0]}" if obstacles else "ready")

    async def wait(client: "ApiClient") -> None:
        await await_ready(client, timeout, show)
        await ask_lab(client, "POST", f"/lab/v1/settle?within={timeout:g}")

    with progress.step("all pods ready"):
        with_client(name, wait)


@lab.command()
@name_argument
@click.option("--all", "every", is_flag=True, help="Take down all labs of this user.")
def down(lab_name: str, lab_argument: str, every: bool) -> None:
    """Take a lab down. Nothing of it stays."""
    from podwire.lab.state import labs

    root = lab_directory(lab_name).path.parent
    directories = [d for d, _ in labs(root)] if every else [lab_directory(lab_argument or lab_name)]
    if not directories:
        click.echo("no lab is up", err=True)
    for directory in directories:
        directory.end()
        directory.remove()
        click.echo(f"lab {directory.name} is down")


@lab.command("ls")
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Output format.")
def list_labs(output: str) -> None:
    """List the labs that are up.

    With -o json: a list of objects with name, pid, nodes (their names), kubeconfig (its path) and server.
    """
    from podwire.lab.state import labs

    rows = [_row(directory, record) for directory, record in labs(lab_directory("default").path.parent)]
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    table = [["NAME", "PID", "NODES", "SERVER", "KUBECONFIG"]]
    table += [[row["name"], str(row["pid"]), str(len(row["nodes"])), row["server"], row["kubeconfig"]] for row in rows]
    print_table(*table)


def _row(directory: "LabDirectory", record: "LabRecord") -> dict[str, Any]:
    return {
        "name": record.name,
        "pid": record.pid,
        "nodes": directory.nodes(),
        "kubeconfig": str(directory.kubeconfig),
        "server": f"https://127.0.0.1:{record.port}",
    }


class _ExecCommand(click.Command):
    """Our options may stand on either side of TARGET; all after `--` is the command's, without `--` all after TARGET."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = "--" in args
        return super().parse_args(ctx, args)


@lab.command(
    "exec",
    cls=_ExecCommand,
    context_settings={"ignore_unknown_options": True},
    short_help="Run a command on a node, in a pod, or outside.",
)
@lab_option
@click.option("-n", "--namespace", default="", help="The pod's namespace, where its name alone could be several.")
@click.option("-t/-T", "--tty/--no-tty", "tty", default=None, help="Give the command a terminal. [default: when this is one]")
@click.argument("target")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(lab_name: str, namespace: str, tty: bool | None, target: str, command: tuple[str, ...]) -> None:
    """Run a command inside the lab: podwire lab exec TARGET -- COMMAND…

    TARGET is a pod ([NAMESPACE/]POD[/CONTAINER]), a node (node-1), `world` (the clients outside the cluster) or `balancer`.
    The exit status is the command's own.
    """
    command = command[1:] if command[0] == "--" else command
    if not command:
        raise click.UsageError("there is no command: podwire lab exec TARGET -- COMMAND…")
    record = lab_directory(lab_name).live_record()
    from podwire.lab.targets import PlaceTarget

    where = _find(lab_name, target, namespace)
    if isinstance(where, PlaceTarget):
        from podwire.lab.join import run_in_place

        sys.exit(run_in_place(record.pid, where.name, command))
    from podwire.cli.podexec import run_in_pod

    sys.exit(with_client(lab_name, lambda client: run_in_pod(client, where, command, tty)))


def _find(lab_name: str, text: str, namespace: str) -> "Target":
    """TARGET → what it names. Places need no question to the API server, so they work when it is broken."""
    from podwire.lab.targets import find_target

    nodes = lab_directory(lab_name).nodes()
    if "/" not in text and not namespace and text in {"world", "balancer", *nodes}:
        return find_target(text, nodes, ())
    import msgspec

    from podwire.model.objects import Pod
    from podwire.model.resources import PODS

    async def ask(client: "ApiClient") -> "Target":
        pods = [msgspec.convert(item, Pod) for item in (await client.list(PODS)).items]
        return find_target(text, nodes, pods, namespace)

    return with_client(lab_name, ask)


@lab.command(short_help="Print the log of the lab itself, or of a pod.")
@lab_option
@click.option("-n", "--namespace", default="", help="The pod's namespace, where its name alone could be several.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("--tail", type=click.IntRange(min=0), default=None, metavar="N", help="Only the last N lines.")
@click.argument("target", required=False)
def logs(lab_name: str, namespace: str, follow: bool, tail: int | None, target: str | None) -> None:
    """Print the log of the lab itself, or of a pod: podwire lab logs [[NAMESPACE/]POD[/CONTAINER]]"""
    from podwire.cli.logs import follow_file, stream_pod_log
    from podwire.lab.targets import PodTarget

    if target is None:
        follow_file(lab_directory(lab_name), tail=tail, follow=follow)
        return
    where = _find(lab_name, target, namespace)
    if not isinstance(where, PodTarget):
        raise click.UsageError(f"{target} is no pod; without TARGET you get the lab's log, in which its agents write")
    with_client(lab_name, lambda client: stream_pod_log(client, where, tail=tail, follow=follow))


@lab.command()
@name_argument
@click.option("--path", is_flag=True, help="Print the file's path instead of its text.")
def kubeconfig(lab_name: str, lab_argument: str, path: bool) -> None:
    """Print a lab's kubeconfig. It holds the token that opens the lab's API server."""
    directory = lab_directory(lab_argument or lab_name)
    directory.live_record()
    click.echo(str(directory.kubeconfig) if path else directory.kubeconfig.read_text(), nl=path)


lab.add_command(fault)


@lab.group()
def node() -> None:
    """Change the nodes of a lab while it runs."""


@node.command("add")
@lab_option
@click.option("--count", type=click.IntRange(1, MAX_NODES), default=1, show_default=True, help="How many.")
def add_node(lab_name: str, count: int) -> None:
    """Add nodes; prints their names when they are ready."""
    for _ in range(count):
        click.echo(_control(lab_name, "POST", "/lab/v1/nodes")["name"])


@node.command("rm", short_help="Remove a node, as if its machine were gone.")
@lab_option
@click.argument("node")
def remove_node(lab_name: str, node: str) -> None:
    """Remove a node with everything on it, as if its machine were gone for good."""
    _control(lab_name, "DELETE", f"/lab/v1/nodes/{node}")
    click.echo(f"{node} is gone")


@node.command("restart", short_help="Kill a node's agent and start it again.")
@lab_option
@click.argument("node")
def restart_node(lab_name: str, node: str) -> None:
    """Kill a node's agent and start it again; its pods and their traffic go on."""
    _control(lab_name, "POST", f"/lab/v1/nodes/{node}/restart")
    click.echo(f"the agent of {node} runs again")


@node.command("proxy-mode")
@lab_option
@click.argument("mode", type=click.Choice(LAB_MODES))
@click.argument("nodes", nargs=-1, metavar="[NODE…]")
def proxy_mode(lab_name: str, mode: str, nodes: tuple[str, ...]) -> None:
    """Change what serves Services, on the nodes named or on all. Connections go on; nothing of the old mode stays.

    Example: podwire lab node proxy-mode iptables node-1
    """
    for name in nodes or [n["name"] for n in _control(lab_name, "GET", "/lab/v1/status")["nodes"]]:
        _control(lab_name, "POST", f"/lab/v1/nodes/{name}/proxy-mode?mode={mode}")
        click.echo(f"{name} serves Services by {mode}")


def _control(lab_name: str, method: str, path: str) -> Any:
    return json.loads(with_client(lab_name, lambda client: ask_lab(client, method, path)))
