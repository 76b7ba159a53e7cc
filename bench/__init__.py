"""Benchmarks: figures measured side by side in one run, printed and written as JSON. Never asserted on by tests."""
