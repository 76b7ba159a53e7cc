"""The revisioned object store: one contract (`port.Store`), several drivers. Values are bytes; only the API server knows what is in them."""
