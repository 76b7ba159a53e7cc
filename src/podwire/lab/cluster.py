"""The composition of a lab."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from podwire.kernel.linux import LinuxKernel
from podwire.lab.boot import NETNS_DIR
from podwire.lab.fabric import Fabric
from podwire.lab.spec import LabSpec
from podwire.lab.state import LabDirectory
from podwire.lab.topology import Topology


class LabCluster:
    """Everything of one lab, in the lab process."""

    def __init__(self, spec: LabSpec, directory: str, listener: int) -> None:
        self.spec = spec
        path = Path(directory)
        self._directory = LabDirectory(path.parent, path.name)
        self._stop = asyncio.Event()

    def request_stop(self) -> None:
        self._stop.set()

    def is_own_child(self, pid: int) -> bool:
        return False

    async def start(self, on_step: Callable[[str, float], None]) -> None:
        t = time.monotonic()
        self._kernel = LinuxKernel()
        self.fabric = Fabric(self._kernel, Topology(self.spec.families, self.spec.balancer_pools), Path(NETNS_DIR))
        await self.fabric.start()
        on_step("fabric", time.monotonic() - t)
        t = time.monotonic()
        for i in range(self.spec.nodes):
            await self.fabric.add_node(i + 1)
        self._directory.write_nodes([f"node{i + 1}" for i in range(self.spec.nodes)])
        on_step("nodes", time.monotonic() - t)

    async def run(self) -> None:
        await self._stop.wait()

    async def close(self) -> None:
        pass
