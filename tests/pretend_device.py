"""An accelerator in host memory, so that device bugs show on a machine without a GPU.

`install()` makes `torch.device("pretend")` known: two devices, "pretend:0" and "pretend:1". Their
tensors lie in host memory and are computed by the CPU's own kernels, so results equal the CPU's bit
for bit. But PyTorch treats them as tensors of another device (its PrivateUse1 backend), and what
CUDA refuses is refused, in CUDA's words:

- operands on different devices; a CPU tensor of no dimensions may stand in for a number, a CPU
  index may index, and nothing else is allowed
- a CPU generator for random numbers on the device, and the other way around; the same seed gives
  other numbers there than on the CPU
- `.numpy()` and everything else that needs host memory
- memory beyond `limit(bytes)`: torch.OutOfMemoryError

`like("mps")` refuses float64 and complex128 as well, as Apple's GPUs do, and the operators in
`lacks`; `like("cuda")` takes that back.

`census()` counts operators; `traffic()` counts copies to and from the host and synchronizations
(`.item()`, `float(t)`, `if t:`); `memory()` gives the bytes in use and their peak.

What it cannot tell: whether a kernel exists, is exact or fast on a real GPU; races between streams;
half-precision kernels that accumulate differently; code that asks for `device.type == "cuda"`.

Needs g++ and ninja; built once (about half a minute of one core) in PyTorch's folder for
extensions, $TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions.
"""

import atexit
import functools
import hashlib
import os
import tempfile
import time
import types
from pathlib import Path

import torch

NAME = "pretend"
DEVICES = 2
SOURCE = Path(__file__).with_suffix(".cpp")
_native = torch.ops.pretend_device


@functools.cache
def _load() -> None:
    """Loads the extension, compiled once for each version of torch and of the source."""
    from torch.utils.cpp_extension import get_default_build_root, load

    key = SOURCE.read_text() + torch.__version__
    name = f"pretend_device_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    home = Path(get_default_build_root())
    library = home / f"{name}.so"
    if not library.exists():
        home.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that two builds at once, or one that is killed, do no harm.
        with tempfile.TemporaryDirectory(dir=home) as folder:
            flags = {"extra_cflags": ["-O1", "-w"], "is_python_module": False}
            load(name, [str(SOURCE)], build_directory=folder, **flags)
            os.replace(Path(folder) / f"{name}.so", library)
    else:
        torch.ops.load_library(library)


def install() -> torch.device:
    """Makes torch.device("pretend") known, once in a process; returns the first of the two.

    Raises RuntimeError or OSError where the extension cannot be built.
    """
    if not hasattr(torch, NAME):
        _load()
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, _module())
        torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=None)
        # An autograd thread that still frees its last graph while Python ends would abort.
        atexit.register(time.sleep, 0.1)
    return torch.device(NAME, 0)


def like(kind: str, lacks: tuple[str, ...] | set[str] = ()) -> None:
    """Refuses what a kind of GPU refuses.

    kind: "cuda", or "mps" for no float64 and complex128; lacks: operators that are refused too
    """
    if kind not in ("cuda", "mps"):
        raise ValueError(f"{kind!r} is neither 'cuda' nor 'mps'")
    _native.no_double(kind == "mps")
    _native.lacks(list(lacks))


def census(forget: bool = True) -> dict[str, int]:
    """Operator -> how often it ran on the device since the counts were last forgotten."""
    return _native.census(forget)


def traffic(forget: bool = True) -> dict[str, int]:
    """Copies to the device and to the host, their bytes, and synchronizations."""
    return _native.traffic(forget)


def memory(device: int = 0) -> dict[str, int]:
    """Bytes in use, their peak since `forget_peak`, and the limit (0: none)."""
    return dict(zip(("now", "peak", "limit"), _native.memory(device), strict=True))


def forget_peak(device: int = 0) -> None:
    """Begins to measure the peak of memory anew."""
    _native.forget_peak(device)


def limit(bytes: int, device: int = 0) -> None:
    """Bytes beyond which the device raises torch.OutOfMemoryError; 0: no limit."""
    _native.limit(device, bytes)


def _module() -> types.ModuleType:
    """torch.pretend, with what PyTorch and other libraries call of a device module."""
    module = types.ModuleType(f"torch.{NAME}")

    def index(device: object = None) -> int:
        if device is None:
            return _native.current()
        if isinstance(device, int):
            return device
        found = torch.device(device).index
        return _native.current() if found is None else found

    class device:
        """`with torch.pretend.device(1):`"""

        def __init__(self, chosen: object) -> None:
            self.chosen = index(chosen)

        def __enter__(self) -> None:
            self.before = _native.current()
            _native.choose(self.chosen)

        def __exit__(self, *_: object) -> None:
            _native.choose(self.before)

    def manual_seed(seed: int, *devices: int) -> None:
        signed = (seed + 2**63) % 2**64 - 2**63  # an operator takes no other
        for number in devices or [_native.current()]:
            _native.seed(number, signed)

    def free_and_total(of: object = None) -> tuple[int, int]:
        used, _, limit = _native.memory(index(of))
        return (limit or 2**40) - used, limit or 2**40

    module.device = device
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.init = module._lazy_init = lambda: None
    module.device_count = lambda: DEVICES
    module.current_device = _native.current
    module.set_device = lambda of: _native.choose(index(of))
    module.synchronize = module.empty_cache = lambda *_: None
    module.manual_seed = manual_seed
    module.manual_seed_all = lambda seed: manual_seed(seed, *range(DEVICES))
    module.get_rng_state = lambda of=None: _native.get_state(index(of))
    module.set_rng_state = lambda state, of=None: _native.set_state(index(of), state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.mem_get_info = free_and_total
    module.memory_allocated = module.memory_reserved = lambda of=None: _native.memory(index(of))[0]
    module.max_memory_allocated = lambda of=None: _native.memory(index(of))[1]
    module.reset_peak_memory_stats = lambda of=None: _native.forget_peak(index(of))
    module.get_device_name = lambda of=None: "pretend"
    return module
