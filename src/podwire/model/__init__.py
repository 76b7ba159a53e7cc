"""Frozen values that every layer shares. No I/O: importing this package must never reach a socket, clock or file."""
