"""Requests to the API server as metrics: client-go's `rest_client_…`, under their names and labels."""

from collections import Counter

from podwire.agent.exposition import Histogram, family, histograms
from podwire.client.api import Asked

_BOUNDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
"""Seconds; Kubernetes'."""


class ClientMetrics:
    """Give every request to `asked` (`ApiClient.subscribe`)."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[tuple[str, str], Histogram] = {}

    def asked(self, asked: Asked) -> None:
        self._requests[asked.code, asked.host, asked.method] += 1
        if asked.seconds is not None:
            series = asked.host, asked.method
            if series not in self._seconds:
                self._seconds[series] = Histogram(_BOUNDS)
            self._seconds[series].observe(asked.seconds)

    def text(self) -> str:
        requests = [
            ({"code": code, "host": host, "method": method}, count)
            for (code, host, method), count in sorted(self._requests.items())
        ]
        durations = [({"host": host, "verb": method}, histogram) for (host, method), histogram in sorted(self._seconds.items())]
        return family(
            "rest_client_requests_total", "counter", "Requests to API servers by the answer's status.", requests
        ) + histograms("rest_client_request_duration_seconds", "Time to an answer; streams are not in it.", durations)
