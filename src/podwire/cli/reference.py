"""The command reference as Markdown, out of the commands' own help. `python -m podwire.cli.reference` prints it."""

from collections.abc import Iterator

import click

from podwire.cli.main import main

_WIDTH = 110
_HEAD = """\
# Command reference

Made from the commands' own `--help` by `python -m podwire.cli.reference`; a test holds the two together.

Exit status everywhere: 0 success; 1 failure, with a line on standard error that says what, where and what to do; 2 wrong usage.
"""


def reference() -> str:
    """The whole document."""
    sections = (f"## `{name}`\n\n```text\n{text}\n```\n" for name, text in _commands(main, "podwire"))
    return "\n".join((_HEAD, *sections))


def _commands(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """Every command with its help, depth first."""
    context = click.Context(command, parent, info_name=name.split()[-1], terminal_width=_WIDTH, **main.context_settings)
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from _commands(found, f"{name} {child}", context)


if __name__ == "__main__":
    click.echo(reference(), nl=False)
