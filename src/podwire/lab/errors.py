"""The lab's branch of the exception tree."""

from podwire.model.errors import PodwireError


class LabError(PodwireError):
    """A lab could not be brought up, found or changed. The message says what to do."""
