"""Writing a file so that, whatever happens, the old file or the complete new one is there."""

import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a new file, which replaces `path` if the block ends without an error.

    The new file lies in the same folder, is flushed to the disk before it is renamed, and is removed if the
    block raises (a full disk, say). It gets the permissions of the file it replaces, or else those that the
    process gives to new files. A symbolic link stays, and the file it points to is replaced.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxprune.files.atomic import replacing
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> with replacing(folder / "a.txt") as new:
      ...     _ = new.write_text("whole")
      >>> [file.name for file in folder.iterdir()], (folder / "a.txt").read_text()
      (['a.txt'], 'whole')
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it.")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        _flush_file(temporary)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


@contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Yield new files by the paths that they replace, the last one last, if the block ends without an error.

    If it raises, no file is replaced. Only a crash between two renames can leave some new and some old.
    """
    with ExitStack() as stack:
        # The stack is left in reverse, so what is entered first is renamed last.
        new = {path: stack.enter_context(replacing(path)) for path in reversed(paths)}
        yield new
        for written in new.values():  # a full disk shows here at the latest, before the first rename
            _flush_file(written)


@contextmanager
def making_folder(path: Path) -> Iterator[None]:
    """Make a folder and its parents where they are missing; remove them again if the block raises.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxprune.files.atomic import making_folder
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> try:
      ...     with making_folder(folder / "a" / "b"):
      ...         raise OSError("the disk is full")
      ... except OSError:
      ...     print(list(folder.iterdir()))
      []
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # somebody else has put a file there
                folder.rmdir()
        raise


def _flush_file(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush a folder, so that a new name in it survives a power cut; Windows cannot, and does not."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
