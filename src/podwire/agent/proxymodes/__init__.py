"""Services in the kernel, one module for each back end."""
