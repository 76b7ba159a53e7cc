"""The node: observe → plan → diff → apply, pod set-up, registration and heartbeat."""
