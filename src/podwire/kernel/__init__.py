"""The only place that touches the kernel: netlink sockets, setns, /proc/sys, subprocesses."""
