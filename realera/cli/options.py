"""What several commands share: their options, the model that they load, a progress bar."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..settings import POSITIVE_COUNT, TOLERANCE, TOLERANCES, Range

if TYPE_CHECKING:
    import torch

    from ..pipelines.interface import Diffusion

DTYPES = ("float32", "float16", "bfloat16")


def number(allowed: Range) -> Callable[[str], Any]:
    """An option's type: a number of this range."""

    def read(text: str) -> Any:
        try:
            return allowed.check("", int(text) if allowed.whole else float(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {allowed}") from None

    return read


def check_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--check", type=number(POSITIVE_COUNT), metavar="N",
        help="draw the first N words of the scope report before and after, in eight steps, and "
        "list those first that change most",
    )  # fmt: skip


def file_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--tolerance",
        type=number(TOLERANCES),
        default=TOLERANCE,
        help="share of T - I that the LoRA file may leave out",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")


def device_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="device to compute on; default: cuda, else cpu")
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision; default: float32 on the CPU, the file's own elsewhere",
    )


def load(options: argparse.Namespace) -> "Diffusion":
    from ..checkpoints.loading import load_model

    return load_model(options.model, dtype_of(options), device_of(options))


def dtype_of(options: argparse.Namespace) -> "torch.dtype | None":
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def device_of(options: argparse.Namespace) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def progress_bar(name: str, unit: str = "") -> Iterator[Any]:
    """A progress bar with time left, as a callback of (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit or "it", leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield progress
