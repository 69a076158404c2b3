"""The directory of compiled programs, before JAX reads it."""

import contextlib
import os
import pathlib
import zlib

ZLIB, ZSTANDARD = b"\x78", b"\x28\xb5\x2f\xfd"
"""How a compressed file begins."""


def remove_damaged(directory: str | os.PathLike) -> None:
    """Removes the compiled programs that a killed process or a full disk has left incomplete.

    JAX neither reads such a file nor writes it again, so that every start would compile its program anew.

    Args:
      directory: of JAX's compilation cache.
    """
    for path in pathlib.Path(directory).glob("*-cache"):
        with contextlib.suppress(OSError):  # another run may have removed it
            if not is_whole(path.read_bytes()):
                path.unlink()


def is_whole(content: bytes) -> bool:
    """Says whether a compressed file can be read; one that zstandard wrote is taken as it is.

    >>> content = zlib.compress(b"program")
    >>> is_whole(content), is_whole(content[:-1]), is_whole(bytes(len(content)))
    (True, False, False)
    """
    if content.startswith(ZSTANDARD):
        return True
    if not content.startswith(ZLIB):
        return False
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True
