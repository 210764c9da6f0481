"""Files that are whole or not there: how everything that the package writes is written.

A file is written beside its place under a name of its own, flushed to the disk, and renamed once. Until the rename the
old file stays; after it the new one is there. What a killed process leaves unfinished, the next save removes.
"""

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apd_lens._block import Block, Part
from apd_lens._errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Seconds to wait for another process that saves to the same folder.
PATIENCE = 120.0
_UNFINISHED = r"\.([0-9a-f]{16}\.)?unfinished"


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path, with `~` as the home folder.

    Raises:
        ArtifactError: no path.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise ArtifactError(f"Expected a path, a str or a pathlib.Path, got {type(path).__name__}: {path!r:.80}.")
    return Path(os.path.expanduser(path))


def write_file(path: Path, content: bytes) -> None:
    """Writes or replaces one file, at once; makes the folders above it. A link stays a link to the new content.

    Raises:
        ArtifactError: it cannot be written (no space, no permission): says why. The old file is as it was.
    """
    path = Path(os.path.realpath(path))
    with writing(path):
        make_folder(path.parent)
        with locked(path.parent):
            sweep(path.parent, re.escape(path.name))
            put(path, content)


def read_file(path: Path, at_most: int) -> bytes:
    """The content of a file. A larger one is refused before memory is taken for it.

    Raises:
        ArtifactError: no such file, larger than `at_most` bytes, or not readable.
    """
    try:
        if not os.path.isfile(path):  # a pipe would never end
            raise ArtifactError(f"{path} is missing, or is no file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > at_most:
                raise ArtifactError(
                    f"{path} has {size} bytes, but at most {at_most} are possible here. It is damaged, or was not "
                    "written by apd_lens. Save again."
                )
            return file.read(size)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an error of the system becomes an ArtifactError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason, remedy = "no space is left on the disk", "Free some space, or choose a path on another disk"
        else:
            reason, remedy = error.strerror or str(error), "Mend that, or choose another path"
        raise ArtifactError(
            f"{path} cannot be written: {reason}. What was there before is still whole. {remedy}, and save again."
        ) from error


def locked(folder: Path, *, shared: bool = False) -> Block:
    """Inside, no other process saves to the folder. The system gives the lock back when a process ends or is killed.

    Where the folder cannot be locked (Windows, some network file systems), it changes nothing.

    Args:
        shared: others may be inside too, if they are shared.

    Raises:
        ArtifactError: another process has kept the lock for longer than `PATIENCE`.
    """
    return _Locked(folder, shared)


class _Locked(Block):
    def __init__(self, folder: Path, shared: bool):
        super().__init__(lambda: _Open(folder))
        self._folder, self._shared = folder, shared

    def start(self) -> None:
        try:
            handle = super().start()
            if fcntl is not None and handle is not None:  # in here, since other threads may enter blocks meanwhile
                _lock(handle, fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX, self._folder)
        except BaseException:
            self.close()
            raise


class _Open(Part):
    """A folder is open, so that it can be locked, where that is possible."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._handle: int | None = None

    def do(self) -> int | None:
        with contextlib.suppress(OSError):
            self._handle = None if fcntl is None else os.open(self._folder, os.O_RDONLY)
        return self._handle

    def undo(self) -> None:
        if fcntl is None or self._handle is None:
            return
        with contextlib.suppress(OSError):  # closed already, before an interrupt
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # also for a process that was forked meanwhile
            os.close(self._handle)
        self._handle = None


def _lock(handle: int, kind: int, folder: Path) -> None:
    assert fcntl is not None
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise ArtifactError(
                    f"Another process has been saving to {folder} for {PATIENCE:.0f} seconds. It may have been "
                    "stopped: continue or end it, or choose another path."
                ) from None
            time.sleep(0.005)
        except OSError:  # no locks here
            return


def put(path: Path, content: bytes) -> None:
    """Writes or replaces one file of a locked folder that exists."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    sync(path.parent)


def sweep(folder: Path, names: str) -> None:
    """Removes what killed saves of the files with these names (a regular expression) left in a locked folder."""
    leftover = re.compile(f"(?:{names}){_UNFINISHED}")
    for entry in os.listdir(folder):
        if leftover.fullmatch(entry):
            with contextlib.suppress(OSError):
                (folder / entry).unlink()


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, flushed to the disk."""
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        sync(made.parent)


def sync(folder: Path) -> None:
    """Flushes the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
