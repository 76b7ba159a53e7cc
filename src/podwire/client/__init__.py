"""Any Kubernetes API server, spoken to as a client: requests, watches, informers, Events, and queues for loops."""
