r"""A checksum behind data whose format has none. Readers of that format do not look behind the data.

    the data
    8 bytes     \x93JPPROG\n
    8           their length
    4           their CRC-32

The integers are unsigned and little-endian.
"""

import struct
import zlib

from jaxprune.files.opened import FileError

_MAGIC = b"\x93JPPROG\n"
_SEAL = struct.Struct("<8sQI")


def seal(data: bytes) -> bytes:
    """Return the data with a checksum behind them.

    Example:
      >>> bytes(unseal(bytearray(seal(b"data"))))
      b'data'
    """
    return data + _SEAL.pack(_MAGIC, len(data), zlib.crc32(data))


def unseal(data: bytearray) -> bytearray:
    """Check the data, and return them without the checksum, which is cut off the array in place.

    A `FileError` does not name the file; neither do those of `jaxprune.io.format`.
    """
    start = max(0, len(data) - _SEAL.size)
    magic, length, crc = _SEAL.unpack(data[start:].rjust(_SEAL.size, b"\0"))
    if magic != _MAGIC:
        raise FileError(f"not an exported program ({len(data)} bytes, which end in no checksum)")
    del data[start:]
    if length != len(data) or crc != zlib.crc32(data):
        raise FileError("the program's checksum is wrong: the file is damaged")
    return data
