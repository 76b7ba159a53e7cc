from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from agentworld import World, world


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[World]:
    """An API server and no node."""
    async with world(tmp_path) as made:
        yield made
