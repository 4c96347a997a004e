"""Memory of pyarrow's libraries: the import touches tens of megabytes of them, of which writing needs a quarter."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

_PAGEOUT = 21  # MADV_PAGEOUT of madvise(2)


def return_library_pages() -> None:
    """Give the pages of pyarrow's files back to the system, which reads those that are used again. Linux only."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None:
        return
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, *_, path = line.split(maxsplit=5)
            if "/pyarrow/" in path:
                start, end = (int(address, 16) for address in span.split("-"))
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
