"""The runtime's branch of the exception tree."""

from podwire.model.errors import PodwireError


class RuntimeFailure(PodwireError):
    """A sandbox or container could not be run. `reason` is kubelet's word for it, as in a container's waiting state."""

    def __init__(self, message: str, reason: str = "RunContainerError") -> None:
        super().__init__(message)
        self.reason = reason
