from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from podwire.testing.memorycluster import MemoryCluster, memory_cluster


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MemoryCluster]:
    """An API server and no node."""
    async with memory_cluster(tmp_path) as made:
        yield made
