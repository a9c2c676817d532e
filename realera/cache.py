"""What is worked out once and kept: files in a cache folder, named for all that decides them.

Torch is imported where a tensor is read or written: to list the files takes none.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 8 << 30  # bytes; what was used longest ago goes first


def cache_folder() -> Path:
    """$REALERA_CACHE, else ~/.cache/realera."""
    return Path(os.environ.get("REALERA_CACHE") or Path.home() / ".cache" / "realera")


def cached(
    kind: str, decided_by: list[object], make: Callable[[], "dict[str, Tensor]"]
) -> "dict[str, Tensor]":
    """What `make` gives, read back where it was made before from the same.

    kind: how the file's name begins; decided_by: everything that decides the tensors, as
    `files.digest` takes it. A damaged file is made anew; a folder that cannot be written to is a
    warning, and the work goes on.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from .files import digest, writing

    path = cache_folder() / f"{kind}-{digest(*decided_by)[:24]}.safetensors"
    try:
        if path.exists():
            with safe_open(path, "pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            os.utime(path)
            return tensors
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} cannot be used and is made anew: {error}", stacklevel=2)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in make().items()}
    try:
        with writing(path, overwrite=True) as part:
            save_file(tensors, part)
        _make_room(path)
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be written to ({error}): this is worked out anew each time. "
            "REALERA_CACHE names another folder",
            stacklevel=2,
        )
    return tensors


def cached_files() -> list[Path]:
    """The files of the cache, the one used longest ago first."""
    return sorted(cache_folder().glob("*-*.safetensors"), key=lambda path: path.stat().st_mtime)


def _make_room(newest: Path) -> None:
    files = cached_files()
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size <= LIMIT or path == newest:
            return
        size -= path.stat().st_size
        path.unlink()
