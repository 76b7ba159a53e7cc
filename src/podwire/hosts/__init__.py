"""podwire on real machines: `podwire server`, and the nodes that join it."""
