"""What the kernel and libfuse agree on when a session begins, and what libfuse never asks for.

The kernel's first request, INIT, offers features; the answer says which of them are wanted. libfuse 3.14 writes that
answer itself and knows nothing of FUSE_HANDLE_KILLPRIV_V2, without which the kernel asks for ``security.capability``
before every write: two round trips for one. Nor does pyfuse3 let us say how many requests may be in flight. So for the
length of this one request libfuse gets a socket in the place of the descriptor, and its answer passes through our
hands. The structures are those of ``linux/fuse.h``.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import Final

HANDLE_KILLPRIV_V2: Final = 1 << 28
"""We take setuid, setgid and capabilities away when a file changes, so that the kernel may remember
of an inode that it has none (Linux 5.11)."""
PARALLEL_DIROPS: Final = 1 << 18
"""Names in one directory may be looked up at the same time: one that takes long holds no other up. The kernel
goes on keeping them apart from what creates and removes names there."""
WANTED = HANDLE_KILLPRIV_V2 | PARALLEL_DIROPS
"""Features asked for beyond libfuse's, where the kernel offers them."""

MAX_BACKGROUND: Final = 128
"""Direct and read-ahead requests in flight per mount; the kernel's default is 12, less than one fio job
at depth 16 keeps going. Well below ``session.MAX_WORKERS``, so that they can't take every worker."""
CONGESTION_THRESHOLD: Final = 96
"""Three quarters of the maximum, as the kernel's own default is."""

_LARGEST = 1 << 20  # the kernel refuses to be read with a small buffer
_INIT_IN = struct.Struct("=40xIIII")  # fuse_in_header; fuse_init_in: major, minor, read-ahead, flags, ...
_INIT_OUT = struct.Struct("=IiQIIII")  # fuse_out_header: length, error, id; fuse_init_out: as above, ...
_CHANGED = struct.Struct("=IHH")  # flags, limit of background requests, congestion threshold
_CHANGED_AT = _INIT_OUT.size - 4


class Handshake:
    """One session's INIT: :meth:`begin` when it can be read, :meth:`finish` once libfuse has handled it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kernel = -1
        self._libfuse: socket.socket | None = None
        self._request = b""

    def begin(self) -> None:
        """Put a socket with INIT in it in the descriptor's place.

        :raises OSError: nothing has been done (ENODEV: the mount is gone already).
        """
        # As at the kernel's descriptor, one read or write is one message.
        self._libfuse, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            try:
                self._kernel = os.dup(self._fd)
                self._request = os.read(self._fd, _LARGEST)
            except OSError:
                self.close()
                raise
            self._libfuse.send(self._request)
            os.dup2(other.fileno(), self._fd, inheritable=False)

    def finish(self) -> None:
        """Pass libfuse's answer on, with what we want as well, and put the kernel's descriptor back."""
        assert self._libfuse is not None
        answer = self._libfuse.recv(_LARGEST, socket.MSG_DONTWAIT)
        with suppress(OSError):  # unmounted or aborted meanwhile: libfuse will hear of it when it reads
            os.write(self._kernel, amended(self._request, answer))
        os.dup2(self._kernel, self._fd, inheritable=False)
        self.close()

    def close(self) -> None:
        """Give up what :meth:`begin` has opened; may be called more than once."""
        if self._libfuse is not None:
            self._libfuse.close()
            self._libfuse = None
        if self._kernel >= 0:
            os.close(self._kernel)
            self._kernel = -1


def amended(request: bytes, answer: bytes) -> bytes:
    """The answer to an INIT request, with those ``WANTED`` flags that the request offers, and our limits."""
    if len(request) < _INIT_IN.size or len(answer) < _CHANGED_AT + _CHANGED.size:
        return answer  # of an older protocol, or an error
    *_, offered = _INIT_IN.unpack_from(request)
    *_, flags = _INIT_OUT.unpack_from(answer)
    result = bytearray(answer)
    _CHANGED.pack_into(result, _CHANGED_AT, flags | offered & WANTED, MAX_BACKGROUND, CONGESTION_THRESHOLD)
    return bytes(result)
