"""What is worked out once and kept: files in a cache folder, named for all that decides them.

Torch is imported where a tensor is read or written: to list the files takes none.
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

LIMIT = 8 << 30  # bytes; what was used longest ago goes first
KINDS = ("anchors", "bank", "drawn", "tails", "vocabulary")


def cache_folder() -> Path:
    """$REALERA_CACHE, else ~/.cache/realera."""
    return Path(os.environ.get("REALERA_CACHE") or "~/.cache/realera").expanduser()


def cached(
    kind: str, decided_by: list[object], make: Callable[[], "dict[str, Tensor]"]
) -> "dict[str, Tensor]":
    """What `make` gives, read back where it was made before from the same.

    kind: one of KINDS, with which the file's name begins; decided_by: everything that decides the
    tensors, as `safetensors_file.digest` takes it. None among them is a fingerprint that is not
    known: nothing is cached then. A damaged file is made anew; where no file can be written there
    is a warning, and the work goes on.
    """
    from .safetensors_file import digest, keep_tensors, open_tensors

    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of cached file; they are {', '.join(KINDS)}")

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
            warnings.warn(f"{path} cannot be used and is made anew: {error}", stacklevel=2)
        else:
            with suppress(OSError):  # another user's, or on a disk that is only read
                os.utime(path)
            return tensors
    tensors = made()
    if not path.is_symlink():  # whose target is not the cache's to replace
        keep_tensors(
            path,
            tensors,
            {},
            "this is computed anew each time. REALERA_CACHE names another folder",
        )
        _make_room(path)
    return tensors


def cached_files() -> list[Path]:
    """The files that `cached` wrote, the one used longest ago first; no links, no other files."""
    name = re.compile(rf"({'|'.join(KINDS)})-[0-9a-f]{{24}}\.safetensors")
    found = [
        path
        for path in cache_folder().glob("*-*.safetensors")
        if name.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    ]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _make_room(newest: Path) -> None:
    files = cached_files()
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size <= LIMIT or path == newest:
            return
        size -= path.stat().st_size
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"{path} cannot be removed to make room: {error}", stacklevel=3)
