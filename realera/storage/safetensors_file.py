"""Safetensors files, read without trust and written atomically.

The header is checked against the size of the file before any tensor is read. A file that is written
appears under its name only when it is complete.
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {  # data types that can be read; the others are only copied
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
COPIED = {"C64": 64, "U64": 64, "U32": 32, "U16": 16}
COPIED |= {"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | COPIED  # per number
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
GGUF = (
    "is quantised in blocks (GGUF), which cannot be rewritten exactly: erase from the safetensors "
    "file that it was made of and quantise that, or load the GGUF file in ComfyUI and apply the "
    "erasure there"
)
OTHERS = {  # first bytes -> what the file is
    b"\xff\xd8\xff": "an image",
    b"\x89PNG": "an image",
    b"RIFF": "an image",  # WebP
    b"7z\xbc\xaf": "an archive: unpack it first",
    b"Rar!": "an archive: unpack it first",
    b"\x1f\x8b": "an archive: unpack it first",  # gzip
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Distinguishes machines that share a folder: a process number is unique on one machine only.
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    dtype: data type, by its name in the format
    begin, end: bytes of the tensor, counted from the start of the data
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """The checked header of a safetensors file; `read` reads one tensor.

    entries: key -> tensor, in the order of the header
    start: byte at which the data begins
    """

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    start: int

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Module -> last parts of the keys of its tensors: "a.to_k" -> ("weight", "bias")."""
        modules: dict[str, list[str]] = {}
        for key in self.entries:
            module, _, leaf = key.rpartition(".")
            modules.setdefault(module, []).append(leaf)
        return {module: tuple(leaves) for module, leaves in modules.items()}

    def read(self, key: str) -> Tensor:
        """Reads a tensor, in the data type of the file.

        Raises ValueError when the data type is not in DTYPES, or the file has become shorter.
        """
        entry = self.entries[key]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: tensor {key!r} is {entry.dtype}, which can only be copied; the data "
                f"types that can be read are {', '.join(DTYPES)}"
            )
        data = bytearray(entry.end - entry.begin)
        with self.path.open("rb") as file:
            file.seek(self.start + entry.begin)
            count = file.readinto(data)
        if count != len(data):
            raise ValueError(f"{self.path} ended while {key!r} was read: the file was changed")
        if not data:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)


def open_tensors(path: str | os.PathLike[str], max_header: int = MAX_HEADER) -> TensorFile:
    """Reads and checks the header of a safetensors file.

    max_header: largest size of a header in bytes

    Raises FileNotFoundError, and ValueError when the file is cut off or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(200)
        length = int.from_bytes(start[:8], "little")
        plausible = size >= 8 and 2 <= length <= max_header and 8 + length <= size
        file.seek(8)
        header = file.read(length) if plausible else b""
    # A safetensors file may have the name of a pickle.
    if not plausible or (path.suffix.lower() in PICKLES and not header.startswith(b"{")):
        what = _other_format(path, start) or (
            f"is not a safetensors file or was cut off: its first 8 bytes announce a header of "
            f"{length} bytes and the file has {size} (at most {max_header} allowed)"
        )
        raise ValueError(f"{path} {what}")
    try:
        content = json.loads(header, object_pairs_hook=_without_duplicates)
        metadata = content.pop("__metadata__", None) or {}
        if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
            raise ValueError("metadata is not text")
        entries = {key: _entry(key, value) for key, value in content.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} has a corrupt safetensors header: {error}") from error

    position = 0  # tensors fill the data without gap or overlap
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(
                f"{path} has a corrupt safetensors header: {key!r} begins at byte {entry.begin} "
                f"of the data instead of {position}"
            )
        position = entry.end
    if 8 + length + position != size:
        raise ValueError(
            f"{path} is {'cut off' if size < 8 + length + position else 'corrupt'}: its header "
            f"describes {8 + length + position} bytes and the file has {size}; get it again"
        )
    return TensorFile(path, metadata, entries, 8 + length)


def _other_format(path: Path, start: bytes) -> str | None:
    """The predicate of a sentence on a file that is not in the safetensors format, or None.

    start: first bytes of the file
    """
    text = " ".join(start.decode("utf-8", "replace").split())
    if not start:
        return "is empty: its download failed or was cut off, get it again"
    if not any(start):
        return (
            "begins with zeros: space was reserved for its download and never filled, get it again"
        )
    if re.match(r"<(?:!doctype|html|head|\?xml)\b", text, re.IGNORECASE):
        return (
            "is a web page, not a model: the site asked for a login or for its terms to be "
            "accepted, or the link leads to a page about the file. Log in and download it again"
        )
    if text.startswith("version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    if start.isascii() and text.isprintable():
        return f"is text, as a failed download leaves it, not a model: {text[:80]!r}. Get it again"
    if start.startswith(b"GGUF"):
        return GGUF
    for first, what in OTHERS.items():
        if start.startswith(first):
            return f"is no model but {what}"
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") or path.suffix.lower() in PICKLES:
        return (
            "is a pickle, which can run any program when it is opened, so it is refused. Convert "
            'it on a machine you can afford to lose: python -c "import torch, safetensors.torch as '
            "s; c = torch.load('in.ckpt', map_location='cpu', weights_only=True); "
            "s.save_file({k: v.contiguous() for k, v in c.get('state_dict', c).items() if "
            "hasattr(v, 'contiguous')}, 'out.safetensors')\""
        )
    return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _entry(key: str, value: Any) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)) or len(shape) > 8:
        raise ValueError(f"{key!r} has the shape {shape} at bytes {begin} to {end}")
    if dtype not in BITS:
        raise ValueError(f"{key!r} has the data type {dtype!r}; known are {', '.join(BITS)}")
    if math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"{key!r}, {dtype} {list(shape)}, does not fit bytes {begin} to {end}")
    return Entry(dtype, shape, begin, end)


def header_bytes(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> bytes:
    """A safetensors header with its length in front, padded so that the data are aligned."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, entry in entries.items():
        offsets = [entry.begin, entry.end]
        content[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor as safetensors stores them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(*things: Any) -> str:
    """SHA-256 of tensors, of what JSON can hold, and of lists and mappings of them, as hex."""
    sha256 = hashlib.sha256()

    def feed(thing: Any) -> None:
        if isinstance(thing, Tensor):
            sha256.update(f"{thing.dtype} {list(thing.shape)}".encode())
            data = thing.detach().cpu().contiguous().flatten().view(torch.uint8)
            sha256.update(data.numpy().data)
        elif isinstance(thing, Mapping):
            feed([[key, value] for key, value in thing.items()])
        elif isinstance(thing, list | tuple):
            sha256.update(f"{len(thing)} of".encode())
            for part in thing:
                feed(part)
        else:
            sha256.update(json.dumps(thing).encode() + b"\n")

    feed(list(things))
    return sha256.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite.

    Infinities and NaN show in the minimum and the maximum, which take a twentieth of the time of
    `tensor.isfinite()` on a CPU.
    """
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # float8 has no order
    return not tensor.numel() or bool(torch.stack([tensor.min(), tensor.max()]).isfinite().all())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; equal content in equal order gives equal bytes.

    The writer of the safetensors package shuffles the metadata and refuses tensors that share
    memory.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Entry] = {}
    position = 0
    for key, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        entries[key] = Entry(names[tensor.dtype], tuple(tensor.shape), position, end)
        position = end
    with path.open("wb") as file:
        file.write(header_bytes(metadata, entries))
        for tensor in tensors.values():
            file.write(raw_bytes(tensor))


def refuse_pickle_name(destination: str | os.PathLike[str]) -> None:
    """Raises ValueError for a name that programs take for that of a pickle."""
    path = Path(destination)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} has the ending of a pickle, and a safetensors file is written: name it "
            f"{path.stem}.safetensors"
        )


def write_if_possible(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], without: str
) -> None:
    """Writes tensors that can be computed again, with a warning instead of an OSError.

    An existing file is replaced.

    without: consequence of a missing file, as the last clause of the warning
    """
    try:
        with writing(path, overwrite=True) as part:
            write_tensors(part, tensors, metadata)
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"{path} cannot be written to ({reason}): {without}", stacklevel=2)


def format_bytes(size: float) -> str:
    """A number of bytes as text: "8.00 GB", "12 bytes"."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.2f} {unit}"
    return f"{size:.0f} bytes"


def refuse_source(destination: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Raises ValueError when the destination is a source, or one of the two contains the other."""
    target = Path(os.path.realpath(destination))
    for source in sources:
        path = Path(os.path.realpath(source))
        same = target.exists() and path.exists() and target.samefile(path)
        if same or path in target.parents or target in path.parents:
            raise ValueError(
                f"{destination} is the source {source}, or one is inside the other: choose another "
                "destination"
            )


def output_file_path(destination: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The path of an output file, with links followed.

    overwrite: whether an existing file may be replaced

    Raises FileExistsError for an existing file unless `overwrite`, and always for a folder, device,
    pipe, socket or circular link.
    """
    path = Path(os.path.realpath(destination))
    if path.is_dir():
        raise FileExistsError(f"{destination} is a folder: name a file")
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(
            f"{destination} is a device, pipe, socket or circular link, which is never replaced: "
            "name a file"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{destination} exists: choose another name, or ask to overwrite it (--overwrite)"
        )
    return path


def make_writable(folder: Path) -> None:
    """Creates a folder. Raises OSError when no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def temporary_path(path: Path, ending: str) -> Path:
    """A hidden path in the folder of `path`, with a name that only this process uses."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.realera-{ending}")


def abandoned_paths(path: Path, ending: str) -> list[Path]:
    """The temporary paths of `path` whose process, on this machine, has ended. No links."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{HOST}-([1-9]\d{{0,8}})\.realera-{ending}")
    return [
        candidate
        for candidate in path.parent.glob(f".*.realera-{ending}")
        if (match := name.fullmatch(candidate.name))
        and not candidate.is_symlink()
        and not _is_running(int(match[1]))
    ]


def _is_running(process: int) -> bool:
    if process == os.getpid():  # an earlier process had the same number
        return False
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def writing(destination: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write a file to, which is renamed to `destination` at the end.

    When the block fails or is interrupted, the temporary file is removed and an existing file is
    kept; the temporary file of a killed process is removed by the next one that writes to
    `destination`. Of a link, the target is replaced. Raises FileExistsError as `output_file_path`.
    """
    path = output_file_path(destination, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in abandoned_paths(path, "tmp"):
        with suppress(OSError):
            abandoned.unlink()
    temporary = temporary_path(path, "tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            error.filename = str(destination)
        raise
