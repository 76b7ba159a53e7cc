"""Fakes that execute, namespace fixtures and a pytest plugin. Shipped, since users test with it too."""

from podwire.testing.fakefabric import FakeFabric
from podwire.testing.fakekernel import FakeKernel

__all__ = ["FakeFabric", "FakeKernel"]
