"""Terminals without Unicode or colours, pipes, and files."""

import io

import pytest

from podwire.cli.progress import Progress
from podwire.cli.table import print_table
from podwire.cli.terminal import has_colours, is_live, suit_encoding


class Stream(io.TextIOWrapper):
    """A terminal, or a file with `tty` False, of some encoding."""

    def __init__(self, encoding: str = "utf-8", *, tty: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    @property
    def written(self) -> bytes:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "✓ a → b … ✗ ß ü 語".encode()),
        ("latin-1", b"+ a -> b ... x \xdf \xfc ?"),
        ("ascii", b"+ a -> b ... x ? ? ?"),
    ],
)
def test_what_cannot_be_shown_is_shown_otherwise(encoding: str, shown: bytes) -> None:
    stream = Stream(encoding, tty=False)
    suit_encoding([stream, None, io.StringIO()])
    stream.write("✓ a → b … ✗ ß ü 語")
    assert stream.written == shown


@pytest.mark.parametrize(
    ("stream", "environ", "live", "coloured"),
    [
        (Stream(), {}, True, True),
        (Stream(), {"TERM": "xterm", "NO_COLOR": ""}, True, True),
        (Stream(), {"NO_COLOR": "1"}, True, False),
        (Stream(), {"TERM": "dumb"}, False, False),
        (Stream("latin-1"), {}, False, True),
        (Stream(tty=False), {}, False, False),
    ],
)
def test_what_a_terminal_can_do(stream: Stream, environ: dict[str, str], live: bool, coloured: bool) -> None:
    assert (is_live(stream, environ), has_colours(stream, environ)) == (live, coloured)


def test_steps_obey_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    stream = Stream()
    with Progress(stream).step("work"):
        pass
    assert stream.written.startswith("✓ work  ".encode())
    assert b"\x1b" not in stream.written


def test_columns_are_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["NAME", "NODES", "WHY"], ["a", "node-1, node-2", ""], ["b" * 200, "", "x"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{'NAME':<200}  NODES           WHY"
    assert lines[1] == f"{'a':<200}  node-1, node-2"
    assert lines[2] == f"{'b' * 200}                  x"
