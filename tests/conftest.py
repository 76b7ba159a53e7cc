"""Shared by all levels: podwire's own pytest plugin, as users have it."""

pytest_plugins = ("podwire.testing.plugin",)
