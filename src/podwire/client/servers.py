"""Which of a cluster's API servers is spoken to: one until it fails, then the next."""

import logging
from collections.abc import Sequence

import aiohttp

from podwire.model.errors import InvalidInput

log = logging.getLogger(__name__)

CONNECT_SECONDS = 3.0
"""Where there is another server, who does not take a connection within this time is passed over."""
CONNECT_SECONDS_ALONE = 10.0
"""Where there is none, it is tried anew: a connection that is asked for while the network is away would notice its return
after half a minute only, for the kernel repeats itself ever more seldom."""


class Servers:
    """`urls` in the order of preference. The choice stays where it is as long as it works: a server that comes back does not
    make every node change over."""

    def __init__(self, urls: str | Sequence[str]) -> None:
        self.urls = tuple(url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls))
        if not self.urls:
            raise InvalidInput("no API server is named")
        self._current = 0

    @property
    def current(self) -> str:
        return self.urls[self._current]

    @property
    def connect_seconds(self) -> float:
        """How long a connection may take to come about."""
        return CONNECT_SECONDS if len(self.urls) > 1 else CONNECT_SECONDS_ALONE

    def failed(self, url: str, why: object) -> bool:
        """`url` cannot serve at present: unless somebody has seen to that, the next one is `current` now, and True returned."""
        if url != self.current or len(self.urls) == 1:
            return False
        self._current = (self._current + 1) % len(self.urls)
        log.warning("the API server at %s failed (%s); going on with %s", url, why, self.current)
        return True


def never_sent(error: Exception) -> bool:
    """Whether the request cannot have reached the server: there was no connection, or none that could be trusted."""
    return isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
