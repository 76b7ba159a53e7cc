"""Printing logs: the lab's own file, and pods' through the API."""

import os
import sys
import time
from contextlib import aclosing
from itertools import islice

from podwire.client.api import ApiClient
from podwire.lab.state import LabDirectory
from podwire.lab.targets import PodTarget
from podwire.model.resources import PODS

_FOLLOW_INTERVAL = 0.2


def follow_file(directory: LabDirectory, *, tail: int | None, follow: bool) -> None:
    """Print the lab's log; with `follow` until the lab has gone. Raises LabError when no such lab is up."""
    directory.live_record()
    with directory.log.open("rb") as file:
        lines = file.readlines()
        start = 0 if tail is None else max(0, len(lines) - tail)
        sys.stdout.buffer.writelines(islice(lines, start, None))
        sys.stdout.flush()
        while follow:
            data = file.read()
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
            if not data:
                if not directory.alive:
                    return
                time.sleep(_FOLLOW_INTERVAL)


async def stream_pod_log(client: ApiClient, target: PodTarget, *, tail: int | None, follow: bool) -> None:
    """Print a container's log. Raises ApiError."""
    params = {"container": target.container}
    if follow:
        params["follow"] = "true"
    if tail is not None:
        params["tailLines"] = str(tail)
    path = PODS.path(target.namespace, target.name, "log")
    async with aclosing(client.stream("GET", path, params=params)) as chunks:
        async for chunk in chunks:
            os.write(sys.stdout.fileno(), chunk)
