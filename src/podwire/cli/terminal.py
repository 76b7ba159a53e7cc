"""What a terminal can show: not each has Unicode, colours, or a cursor that can go back."""

import codecs
import io
from collections.abc import Iterable, Mapping
from typing import TextIO

_IN_ASCII = {"✓": "+", "✗": "x", "→": "->", "–": "-", "−": "-", "…": "..."}
_HANDLER = "podwire.ascii"


def suit_encoding(streams: Iterable[object]) -> None:
    """Let text streams that cannot show all characters show ours in ASCII, and others as `?`, in the place of an error."""
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and not _is_unicode(stream):
            stream.reconfigure(errors=_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end


def is_live(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a line may be written over: a terminal that understands so, and has the characters of our spinner."""
    return stream.isatty() and environ.get("TERM") != "dumb" and _is_unicode(stream)


def has_colours(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """A terminal whose user did not say NO_COLOR (no-color.org)."""
    return stream.isatty() and environ.get("TERM") != "dumb" and not environ.get("NO_COLOR")


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "utf-8").lower().startswith("utf")
