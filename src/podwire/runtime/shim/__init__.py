"""The shim: one small process that makes and keeps pods, so that they outlive the agent.

It imports the standard library and `podwire.kernel.syscalls` only (a light, single-threaded process forks fast and can move
itself between namespaces). `podwire.runtime.shimclient` starts it and talks to it.
"""
