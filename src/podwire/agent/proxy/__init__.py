"""The service part of the agent alone: `podwire proxy`, kube-proxy's job."""
