"""The composition of a lab."""

import asyncio
import time
from collections.abc import Callable

from podwire.lab.spec import LabSpec


class LabCluster:
    """Everything of one lab, in the lab process."""

    def __init__(self, spec: LabSpec, directory: str, listener: int) -> None:
        self.spec = spec
        self._stop = asyncio.Event()

    def request_stop(self) -> None:
        self._stop.set()

    def is_own_child(self, pid: int) -> bool:
        return False

    async def start(self, on_step: Callable[[str, float], None]) -> None:
        on_step("namespaces", time.monotonic())

    async def run(self) -> None:
        await self._stop.wait()

    async def close(self) -> None:
        pass
