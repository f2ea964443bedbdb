r"""A checksum at the end of bytes whose own format has none, where that format's readers do not look.

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
    """The data with their checksum after them.

    Example:
      >>> bytes(unseal(bytearray(seal(b"data"))))
      b'data'
    """
    return data + _SEAL.pack(_MAGIC, len(data), zlib.crc32(data))


def unseal(data: bytearray) -> bytearray:
    """The data without the checksum, which is taken off the array itself.

    Raises:
      FileError: without the file's name: there is no checksum, or it is wrong.
    """
    start = max(0, len(data) - _SEAL.size)
    magic, length, crc = _SEAL.unpack(data[start:].rjust(_SEAL.size, b"\0"))
    if magic != _MAGIC:
        raise FileError(f"not an exported program ({len(data)} bytes, which end in no checksum)")
    del data[start:]
    if length != len(data) or crc != zlib.crc32(data):
        raise FileError("the program's checksum is wrong: the file is damaged")
    return data
