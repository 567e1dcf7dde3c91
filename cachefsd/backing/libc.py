"""The C library. Modules declare what they call of it.

cffi in ABI mode: no compiler is needed, a call costs less than with ctypes, and it releases the GIL.
"""

from __future__ import annotations

import os
from typing import Any

import cffi

# linux/fcntl.h
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000

ffi = cffi.FFI()
ffi.cdef(
    """
    long syscall(long number);
    int unshare(int);
    """
)
libc: Any = ffi.dlopen(None)
"""``libc.syscall`` is variadic; cast to a fixed prototype its arguments need no casts."""


def fail() -> OSError:
    """The error of the last call in this thread."""
    return OSError(ffi.errno, os.strerror(ffi.errno))


def check(result: int) -> int:
    """What a call has returned.

    :raises OSError: it says that it has failed.
    """
    if result < 0:
        raise fail()
    return result
