"""Pods as processes on one node: sandboxes, containers, supervision, and the node's server for logs and exec."""
