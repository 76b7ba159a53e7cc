"""The loops on the API's side. Each is a pure function from what exists to what must be written, and a small loop around it.

They use the Kubernetes API and nothing else, so each works with any API server.
"""
