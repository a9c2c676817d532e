"""The note of a run in its output folder: one run at a time, and the same command goes on."""

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
    """Which outputs a run has begun to write, in a file that it holds locked until it ends.

    A run that succeeds removes the note. Where one was stopped, the same command may replace what
    the note names: its first line is the command, every other line an output, alone before it is
    written and with its identity afterwards.

    folder: output folder, made unless it is there
    command: text of all that decides the outputs, without a line break
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.path, self.command = folder, folder / NAME, command
        self.begun: dict[str, str] = {}  # output -> its identity, "" while it is written
        self.own = False  # whether the file's first line is this command

    def __enter__(self) -> "RunNote":
        """Raises FileExistsError when another run holds the note or the name is taken, OSError when
        no file can be written to the folder."""
        self.made = not self.folder.exists()
        make_writable(self.folder)
        self.file = _open_locked(self.path)
        self.file.seek(0)
        command, *outputs = self.file.read().decode("utf-8", "replace").split("\n")
        self.own = command == self.command
        if self.own:
            self.begun = {name: own for name, _, own in (out.partition("\t") for out in outputs)}
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
        """Whether an output that is there was written by a run of this command that was stopped."""
        return name in self.begun and self.begun[name] in ("", self._identity(name))

    @contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """Notes that these outputs are written in the block."""
        for name in names:
            self._append(name)
        yield
        for name in names:
            self._append(f"{name}\t{self._identity(name)}")

    def _append(self, line: str) -> None:
        try:
            if not self.own:  # of another command, whose outputs are not in the way
                self.file.truncate(0)
                self.file.write(self.command.encode())
                self.own = True
            self.file.write(f"\n{line}".encode())  # so that a line that was cut off ends here
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
    """The file, which no other process holds; it is made unless it is there."""
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
        file.close()  # the run that held it removed it meanwhile


def _lock(file: IO[bytes]) -> bool:
    """Locks the file until it is closed or the process ends, unless another process holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # what is locked there cannot be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a disk without locks
        return True
    return True
