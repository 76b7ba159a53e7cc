"""Subnet managers: where a node's own subnet and those of its peers come from. One contract (`port`), two of them."""
