"""The pause program: the process that holds a pod's namespaces and does nothing else.

It is an ELF file of some 200 bytes, made here, so that no compiler and no image is needed and a pod's fixed cost is a few
pages of memory. SIGCHLD must be ignored before it is executed: then the kernel itself reaps whatever is orphaned to it.
"""

import os
import struct

_BASE = 0x400000
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")

_EM_X86_64, _EM_AARCH64 = 62, 183
_PT_LOAD, _PT_GNU_STACK = 1, 0x6474E551
_READ, _WRITE, _EXECUTE = 4, 2, 1

# for (;;) pause();           mov eax, 34 (pause); syscall; jmp -9
_X86_64 = bytes.fromhex("b822000000 0f05 ebf7")
# for (;;) ppoll(0,0,0,0,0);  mov x8, #73; mov x0…x4, #0; svc 0; b -28   (this architecture has no pause)
_AARCH64 = struct.pack("<8I", 0xD2800928, 0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003, 0xD2800004, 0xD4000001, 0x17FFFFF9)

_PROGRAMS = {"x86_64": (_EM_X86_64, _X86_64), "aarch64": (_EM_AARCH64, _AARCH64)}


def build_pause(machine: str) -> bytes:
    """The program for `machine`, in the spelling of `uname -m`. Raises KeyError where there is none."""
    elf_machine, code = _PROGRAMS[machine]
    headers = _HEADER.size + 2 * _SEGMENT.size
    size = headers + len(code)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bit, little endian, version 1
    header = _HEADER.pack(
        ident, 2, elf_machine, 1, _BASE + headers, _HEADER.size, 0, 0, _HEADER.size, _SEGMENT.size, 2, 64, 0, 0
    )
    text = _SEGMENT.pack(_PT_LOAD, _READ | _EXECUTE, 0, _BASE, _BASE, size, size, 0x1000)
    stack = _SEGMENT.pack(_PT_GNU_STACK, _READ | _WRITE, 0, 0, 0, 0, 0, 16)
    return header + text + stack + code


def write_pause(path: str, machine: str) -> None:
    """Put the program at `path`, executable. Atomic: another process may be executing an earlier copy."""
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o755)
    try:
        os.write(fd, build_pause(machine))
    finally:
        os.close(fd)
    os.replace(temporary, path)
