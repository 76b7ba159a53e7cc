"""docs/reference/cli.md says what `--help` says."""

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "cli.md"


def test_the_page_is_the_help() -> None:
    """In a process of its own: click remembers how a command names its help option, and tests invoke some without `podwire`."""
    made = subprocess.run([sys.executable, "-m", "podwire.cli.reference"], check=True, capture_output=True, text=True)
    assert PAGE.read_text() == made.stdout, "run: python -m podwire.cli.reference > docs/reference/cli.md"
