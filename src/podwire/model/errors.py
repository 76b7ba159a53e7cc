"""The root of the exception tree. Each boundary derives its own branch; nobody parses messages.

PodwireError
├── InvalidInput          something a user wrote is wrong; says what, where and what to do
├── Unsupported           this kernel or machine lacks a feature; `feature` names it
├── KernelError           a system call or netlink request failed      (podwire.kernel)
├── StoreError            conflict, compacted, …                       (podwire.store)
├── ApiError              an API server's metav1.Status                (podwire.client)
├── EtcdError             what etcd refused, or that it did not answer (podwire.client.etcdmessages)
├── RuntimeFailure        a sandbox or container could not be run      (podwire.runtime)
└── LabError              a lab could not be brought up or found       (podwire.lab)
"""


class PodwireError(Exception):
    """Base of all errors that podwire raises on purpose."""


class InvalidInput(PodwireError):
    """Input from a user that cannot be used. The message is one sentence fit to print as it is."""


class Unsupported(PodwireError):
    """The machine lacks `feature`; `advice` is what to do about it."""

    def __init__(self, feature: str, advice: str = "") -> None:
        self.feature, self.advice = feature, advice
        super().__init__(f"this machine lacks {feature}" + (f": {advice}" if advice else ""))
