"""Options, model loading and the progress bar, shared by several commands."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..concepts import STYLE_TEMPLATES, TEMPLATES
from ..settings import POSITIVE_COUNT, TOLERANCE, TOLERANCES, Range

if TYPE_CHECKING:
    import torch

    from ..pipelines.interface import Diffusion
    from ..text.encoding import TextEncoder

DTYPES = ("float32", "float16", "bfloat16")


def number(allowed: Range) -> Callable[[str], Any]:
    """The type of an option for a number of this range."""

    def read(text: str) -> Any:
        try:
            return allowed.check("", int(text) if allowed.whole else float(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {allowed}") from None

    return read


def model_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="checkpoint file, diffusers folder, or a model of 'demo'")


def templates_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The templates of --template and --style."""
    return tuple(options.template or (STYLE_TEMPLATES if options.style else TEMPLATES))


def template_options(sub: argparse.ArgumentParser) -> None:
    style = "use templates that name a style ('an artwork by {}')"
    sub.add_argument("--style", action="store_true", help=style)
    sub.add_argument(
        "--template", action="append",
        help="prompt that names the concept, with {} in its place; repeat for several",
    )  # fmt: skip


def check_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--check", type=number(POSITIVE_COUNT), metavar="N",
        help="draw the first N words of the scope report before and after, in eight steps, and "
        "list the words whose images change most first",
    )  # fmt: skip


def file_options(sub: argparse.ArgumentParser) -> None:
    share = "share of T - I that the LoRA file may leave out"
    sub.add_argument("--tolerance", type=number(TOLERANCES), default=TOLERANCE, help=share)
    overwrite_option(sub)


def overwrite_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")


def device_options(sub: argparse.ArgumentParser) -> None:
    device = "device to compute on; default: the accelerator that PyTorch finds, or cpu"
    sub.add_argument("--device", help=device)
    dtype = "precision; default: float32 on the CPU, that of the file on other devices"
    sub.add_argument("--dtype", choices=DTYPES, help=dtype)


def load(options: argparse.Namespace) -> "Diffusion":
    """The model, on the device that `device_of` gives."""
    from ..checkpoints.loading import load_model

    return load_model(options.model, *_dtype_and_device(options))


def load_encoder(options: argparse.Namespace) -> "TextEncoder":
    """The text encoder of the model, without the network."""
    from ..checkpoints.loading import load_text

    return load_text(options.model, *_dtype_and_device(options))


def _dtype_and_device(options: argparse.Namespace) -> "tuple[torch.dtype | None, str]":
    import torch

    device = device_of(options)
    print(f"device: {device}", file=sys.stderr)
    return None if options.dtype is None else getattr(torch, options.dtype), device


def device_of(options: argparse.Namespace) -> str:
    """The device of --device; default: the accelerator that PyTorch finds, or the CPU.

    Raises ValueError when PyTorch cannot compute on the device.
    """
    import torch

    device = options.device
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch is built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: PyTorch cannot compute on it ({reason})") from error
    return device


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


@contextmanager
def progress_bar(name: str, unit: str = "") -> Iterator[Any]:
    """A progress bar with the time left, as a callback with (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit or "it", leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield progress
