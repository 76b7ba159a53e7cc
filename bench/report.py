"""What all benchmarks share: `--json` prints the figures on standard output; the table for people goes to standard error."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

Figures = dict[str, Any]


def main(run: Callable[[], Figures]) -> None:
    """The body of `python -m bench.NAME`."""
    figures = run()
    if "--json" in sys.argv[1:]:
        json.dump(figures, sys.stdout)


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[object]]) -> None:
    """Rows of columns, aligned; the first row is the head."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    for row in texts:
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(cell: object) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def percentiles(values: Sequence[float]) -> Figures:
    """{"p50", "p95", "p99", "max", "n"} of at least two values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values), "n": len(values)}
