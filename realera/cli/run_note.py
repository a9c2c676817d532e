"""A locked note in the output folder: one run at a time; the same command resumes a stopped run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from ..storage.safetensors_file import make_writable

NAME = ".realera-run"


class RunNote:
    """A file that lists the outputs of a run, locked until the run ends.

    A run that succeeds removes the note. After a run that was stopped, the same command may replace
    the outputs in the note. The first line is the command; every other line is an output, first the
    name alone, and again with inode and time once the output is written.

    folder: output folder, created if missing
    command: text that determines the outputs, without a line break
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.path, self.command = folder, folder / NAME, command
        self.begun: dict[str, str] = {}  # output -> identity, "" while it is written
        self.resumed = False  # whether the first line of the file is this command

    def __enter__(self) -> "RunNote":
        """Raises FileExistsError when another run holds the note or the name is taken, and OSError
        when the folder is read-only."""
        self.made = not self.folder.exists()
        make_writable(self.folder)
        self.file = _open_locked(self.path)
        self.file.seek(0)
        command, *outputs = self.file.read().decode("utf-8", "replace").split("\n")
        self.resumed = command == self.command
        if self.resumed:
            parts = (output.partition("\t") for output in outputs)
            self.begun = {name: identity for name, _, identity in parts}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        with self.file:
            if kind is None or not self.path.stat().st_size:
                try:
                    self.path.unlink()
                except PermissionError:  # Windows removes no file that is open
                    self.file.close()
                    self.path.unlink()
        if kind is not None and self.made:
            with suppress(OSError):  # something is in it
                self.folder.rmdir()

    def may_replace(self, name: str) -> bool:
        """Whether an existing output was written by a stopped run of this command."""
        return name in self.begun and self.begun[name] in ("", self._identity(name))

    @contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """Records that the block writes these outputs."""
        for name in names:
            self._append(name)
        yield
        for name in names:
            self._append(f"{name}\t{self._identity(name)}")

    def _append(self, line: str) -> None:
        try:
            if not self.resumed:  # a note of another command, of which no output is replaced
                self.file.truncate(0)
                self.file.write(self.command.encode())
                self.resumed = True
            self.file.write(f"\n{line}".encode())  # starts with the end of a line that was cut off
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _identity(self, name: str) -> str:
        try:
            found = os.stat(self.folder / name)
        except FileNotFoundError:
            return ""
        return f"{found.st_ino} {found.st_mtime_ns}"


def _open_locked(path: Path) -> IO[bytes]:
    """The file, created if missing, and locked by this process."""
    while True:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise FileExistsError(f"{path} is no regular file: remove it, or choose another folder")
        file = path.open("a+b", buffering=0)
        if not _lock(file):
            file.close()
            raise FileExistsError(
                f"another run is writing to {path.parent}: wait until it ends, or choose another "
                "folder"
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # another run has removed the file


def _lock(file: IO[bytes]) -> bool:
    """Locks the file until it is closed; False when another process holds the lock."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # locked bytes cannot be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a disk without locks
        return True
    return True
