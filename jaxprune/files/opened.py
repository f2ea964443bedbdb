"""Opening a regular file to read; a pipe or a device might never end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from jaxprune.tree.checks import shown


class FileError(ValueError):
    """A file that is damaged, not of this format, or not what was asked for; the message says which."""


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read.

    Raises:
      FileError: a pipe or a device, which might never end; a path with a null character.
      OSError: there is no such file, or it cannot be read.

    Example:
      >>> import jaxprune as jp
      >>> try:
      ...     jp.io.load("/dev/null")
      ... except jp.io.FileError as error:
      ...     print(error)
      /dev/null: not a file, but a pipe or a device.
    """
    check_path(path)
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise FileError(f"{path!r} is not a path: {error}.") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises by itself
        raise FileError(f"{os.fspath(path)}: not a file, but a pipe or a device.")
    return Path(path).open("rb")


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a path is one: a number would be that of an open file.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"a path must be a str or a pathlib.Path, got {shown(path)}.")
