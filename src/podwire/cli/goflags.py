"""Go's way of writing flags, for commands that stand in for Go programs: `--flag` and `--flag=false` without `--flag false`,
`-v=2`, `--some_flag`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class GoCommand(click.Command):
    """Options of type bool are switches: they never take the next word for their value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        switches = {name for option in self.params if option.type is click.BOOL for name in option.opts}
        return super().parse_args(ctx, list(_as_click(args, switches)))


def switch(name: str, *more: str, text: str) -> Callable[[F], F]:
    """A switch for a `GoCommand`, off by default."""
    return click.option(name, *more, type=click.BOOL, metavar="[=true|false]", default=False, help=text)


def _as_click(args: Sequence[str], switches: Collection[str]) -> Iterator[str]:
    for position, argument in enumerate(args):
        if argument == "--":
            yield from args[position:]
            return
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
            yield f"{name}=true" if name in switches and not equals else name + equals + value
        elif equals and len(name) == 2 and name[0] == "-":
            yield name
            yield value
        else:
            yield argument
