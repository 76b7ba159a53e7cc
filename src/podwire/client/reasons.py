"""Why a server did not answer, in the system's words: those of the HTTP library repeat the address, and hide the cause."""

import os
import ssl

import aiohttp


def why_no_answer(error: Exception) -> str:
    """A few words, such as "Connection refused"."""
    cause = getattr(error, "certificate_error", None)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return in_system_words(error.os_error)
    if isinstance(error, TimeoutError):
        return "timed out"
    return str(error) or type(error).__name__


def in_system_words(error: OSError) -> str:
    """What the system says of an error, less what Python and its libraries put behind it."""
    if error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)  # getaddrinfo's numbers, which have words of their own, or several errors at once
