"""The cache: tensors that take long to compute, in files named by a hash of their inputs.

Torch is imported where a tensor is read or written; listing the files does not need it.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("anchors", "bank", "drawn", "shares", "tails", "vocabulary")


def cache_folder() -> Path:
    """The folder of the cache: $REALERA_CACHE, by default ~/.cache/realera."""
    return Path(os.environ.get("REALERA_CACHE") or "~/.cache/realera").expanduser()


def cache_limit() -> float:
    """Bytes that the cache may hold: $REALERA_CACHE_GB gigabytes, by default 8.

    The least recently used files are removed first. Raises ValueError for what is no size.
    """
    given = os.environ.get("REALERA_CACHE_GB") or "8"
    try:
        if (gigabytes := float(given)) >= 0:
            return gigabytes * 1e9
    except ValueError:
        pass
    raise ValueError(f"REALERA_CACHE_GB = {given}: it must be a number of gigabytes, such as 8")


def empty_cache() -> list[Path]:
    """Removes the files that `cached` wrote. Returns their paths."""
    files = cached_files()
    for path in files:
        path.unlink(missing_ok=True)
    return files


def cached(
    kind: str, decided_by: list[object], make: Callable[[], "dict[str, Tensor]"]
) -> "dict[str, Tensor]":
    """The tensors that `make` returns, from the cache if an earlier call had the same inputs.

    A damaged file is replaced. A file that cannot be written is a warning.

    kind: kind of the tensors, one of KINDS, with which the name of the file begins
    decided_by: everything that decides the tensors, as `safetensors_file.digest` takes it; with a
        None among it (an unknown fingerprint) nothing is cached
    make: called without arguments when the cache has no such file
    """
    from .safetensors_file import digest, open_tensors, write_if_possible

    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: it must be one of {', '.join(KINDS)}")

    def made() -> "dict[str, Tensor]":
        return {key: tensor.cpu().contiguous() for key, tensor in make().items()}

    if any(part is None for part in decided_by):
        return made()
    path = cache_folder() / f"{kind}-{digest(*decided_by)[:24]}.safetensors"
    if path.exists():
        try:
            file = open_tensors(path)
            tensors = {key: file.read(key) for key in file.entries}
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} cannot be used and is replaced: {error}", stacklevel=2)
        else:
            with suppress(OSError):  # a file of another user, or on a read-only disk
                os.utime(path)
            return tensors
    limit = cache_limit()  # refused before the work where it cannot be read
    tensors = made()
    if not path.is_symlink():  # its target may lie outside of the cache
        without = "this is computed anew each time; REALERA_CACHE names another folder"
        write_if_possible(path, tensors, {}, without)
        _make_room(path, limit)
    return tensors


def cached_files() -> list[Path]:
    """The files that `cached` wrote, the least recently used first; no links, no other files."""
    name = re.compile(rf"({'|'.join(KINDS)})-[0-9a-f]{{24}}\.safetensors")
    files = [
        path
        for path in cache_folder().glob("*-*.safetensors")
        if name.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    ]
    return sorted(files, key=lambda path: path.stat().st_mtime)


def _make_room(newest: Path, limit: float) -> None:
    files = cached_files()
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size <= limit or path == newest:
            return
        size -= path.stat().st_size
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"{path} cannot be removed to make room: {error}", stacklevel=3)
