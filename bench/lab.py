"""How long a lab takes to be ready, and what it weighs: 3 nodes; 10 nodes with 100 pods; 50 nodes with 500 pods."""

import tempfile
import time
from pathlib import Path

from bench.labs import lab
from bench.report import Figures, main, say, table

PODS = """\
apiVersion: apps/v1
kind: Deployment
metadata: {{name: filler, labels: {{app: filler}}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: filler}}}}
  template:
    metadata: {{labels: {{app: filler}}}}
    spec:
      containers: [{{name: web, image: "bench/web:1", ports: [{{containerPort: 8080}}]}}]
"""


def run() -> Figures:
    ready = [_boot(3)["seconds"] for _ in range(5)]
    small, large = _boot(10, 100), _boot(50, 500)
    say(f"  lab of 3 nodes ready: median {sorted(ready)[2]:.2f} s of {len(ready)} (aim ≤ 2 s)")
    table(
        [
            ("nodes", "pods", "ready s", "memory MB"),
            (10, 100, small["seconds"], small["memory_mb"]),
            (50, 500, large["seconds"], large["memory_mb"]),
            ("×5", "×5", large["seconds"] / small["seconds"], large["memory_mb"] / small["memory_mb"]),
        ]
    )
    say("  (aims at 50/500: ≤ 60 s, ≤ 1024 MB; the last row is the growth from 10 to 50 nodes)")
    return {"three_nodes_ready_s": ready, "10x100": small, "50x500": large}


def _boot(nodes: int, pods: int = 0) -> Figures:
    """Seconds from the command to every node and pod ready, and the memory then."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "pods.yaml"
        manifest.write_text(PODS.format(replicas=pods))
        options = ["--nodes", str(nodes), *(["-f", str(manifest)] if pods else [])]
        started = time.perf_counter()
        with lab(f"bench-{nodes}", *options) as running:
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "memory_mb": running.memory_mb(), "processes": len(running.processes())}


if __name__ == "__main__":
    main(run)
