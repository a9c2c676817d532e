"""Files appear whole or not at all, and never in place of another without being told to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new path beside `path` to write to; renamed to it when all went well.

    A file that stood there is replaced in one step; after an error it stands as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError when `path` is there and `overwrite` is not set."""
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists: name another file, or say that it may be overwritten"
        )
