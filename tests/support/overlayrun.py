"""An overlay agent that runs while a test looks at it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from podwire.agent.overlayd.agent import OverlayAgent


@asynccontextmanager
async def run_until_left(agent: OverlayAgent) -> AsyncIterator[None]:
    """In the block it has programmed its host; behind it, it has ended. Raises what it raises before it is ready."""
    task = asyncio.create_task(agent.run())
    ready = asyncio.create_task(agent.ready())
    try:
        await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield
    finally:
        for one in (task, ready):
            one.cancel()
        await asyncio.wait((task, ready))
