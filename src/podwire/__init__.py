"""podwire: the Kubernetes network as one Python program."""

__version__ = "0.1.0"
