"""How long `podwire --help` takes, beside an empty Python, in the same run."""

import statistics
import subprocess
import sys
import time

from bench.report import Figures, main, table

RUNS = 15


def run() -> Figures:
    rows = {
        "python3 -c pass": [sys.executable, "-c", "pass"],
        "podwire --help": [sys.executable, "-m", "podwire.cli.main", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(RUNS):
        for name, command in rows.items():
            started = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            times[name].append((time.perf_counter() - started) * 1000)
    medians = {name: statistics.median(values) for name, values in times.items()}
    table([("command", "median ms"), *medians.items()])
    return {"median_ms": medians}


if __name__ == "__main__":
    main(run)
