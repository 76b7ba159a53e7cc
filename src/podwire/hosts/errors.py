"""What goes wrong on a host before or beside the API."""

from podwire.model.errors import PodwireError


class HostError(PodwireError):
    """A server or a node cannot be set up, started or removed as asked."""
