"""Tables on standard output: columns as wide as their widest cell, never cut, so that scripts can read them too."""

from collections.abc import Sequence

import click


def print_table(*rows: Sequence[str]) -> None:
    """The first row has the heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
