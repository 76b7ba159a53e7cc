"""`podwire agent`: flanneld's job on any host. Leases from a subnet manager, a back end in the kernel, files for the rest."""
