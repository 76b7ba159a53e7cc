"""docs/reference/cli.md says what `--help` says."""

from pathlib import Path

from podwire.cli.reference import reference

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "cli.md"


def test_the_page_is_the_help() -> None:
    assert PAGE.read_text() == reference(), "run: python -m podwire.cli.reference > docs/reference/cli.md"
