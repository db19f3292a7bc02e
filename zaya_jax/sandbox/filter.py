"""The system calls that no program needs and that reach out of a sandbox: a seccomp filter.

A second line of defence: namespaces, an unprivileged user and limits come before it.
"""

import platform
import struct
import sys

# Numbers on x86-64 and aarch64, of <asm/unistd.h>.
FORBIDDEN = {
    # into other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    # memory that belongs to no process, which nothing here counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    # keys, and interfaces of the kernel with a history of holes
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
}
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # AUDIT_ARCH of <linux/audit.h>

NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag
AF_UNIX, EPERM, ENOSYS = 1, 1, 38
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, MACHINE, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def call_filter() -> bytes:
    """BPF instructions for this machine; empty where the numbers of its calls are not known.

    Sockets are allowed within the sandbox only (AF_UNIX): some families, such as AF_VSOCK, know no
    network namespaces. clone3 keeps its flags where no filter sees them, so it is said not to
    exist, and libraries fall back to clone.
    """
    if sys.platform != "linux" or platform.machine() not in MACHINES or sys.maxsize < 2**32:
        return b""
    column, machine = MACHINES[platform.machine()]
    # (operation, how many to skip if true, if false, operand)
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL)]
    # x32 has the same machine and other numbers.
    lines += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]
    for numbers in FORBIDDEN.values():
        lines += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE | EPERM)]
    lines += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, REFUSE | ENOSYS)]
    lines += [(EQUAL, 0, 4, SOCKET[column]), (LOAD, 0, 0, ARGUMENT)]
    lines += [(EQUAL, 0, 1, AF_UNIX), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE | EPERM)]
    lines += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, ARGUMENT)]
    lines += [(ANY_BIT, 0, 1, NEW_NAMESPACES), (RETURN, 0, 0, REFUSE | EPERM)]
    lines += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
