"""The revisioned object store: one contract (`port.Store`), several drivers. Values are opaque bytes to it."""
