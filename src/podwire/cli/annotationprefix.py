"""The option --kube-annotation-prefix."""

import re

import click


def annotation_prefix(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The value of --kube-annotation-prefix, checked."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/([A-Za-z0-9][A-Za-z0-9._-]*)?)?", value):
        raise click.BadParameter(
            f"{value!r} is no prefix of annotations, such as example.org or example.org/flannel", ctx, param
        )
    return value
