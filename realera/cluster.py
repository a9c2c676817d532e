"""The parts of a job, one after the other here or at once on the machines of a Ray cluster.

The only file that knows Ray. It schedules, moves what was summed and runs again what was lost; its
own RAY_ADDRESS names a cluster, and unless it is set one is started on this machine.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, reduce
from operator import add
from pathlib import Path
from typing import Any

from .checkpoints.loading import load_model, load_text
from .edit.erasure import Lora, joined
from .edit.erasure_file import load_erasure
from .groups import Group, Job, PartialSums, align_group, part_of
from .pipelines.interface import Diffusion
from .settings import Training
from .text.encoding import TextEncoder

RETRIES = 5  # of a part whose worker was lost

Progress = Callable[[int, int], None]


def summed(engine: str, job: Job, groups: Sequence[Group], progress: Progress) -> PartialSums:
    """The parts of all groups, added. progress is called with (groups done, in all).

    Raises ImportError that says how to install Ray, and ValueError as `groups.part_of`.
    """
    if engine == "ray":
        return _on_ray(job, _part, [(n, group) for n, group in enumerate(groups)], progress)

    def parts() -> Iterator[PartialSums]:
        for n, group in enumerate(groups):
            yield part_of(text_of(job), job, n, group)
            progress(n + 1, len(groups))

    return reduce(add, parts())


def aligned(
    engine: str,
    job: Job,
    groups: Sequence[Group],
    erasure: Path,
    training: Training,
    progress: Progress,
) -> Lora:
    """The LoRAs of all groups on top of the erasure in a file, joined. progress: as of `summed`."""
    asked = [(n, group, erasure, training) for n, group in enumerate(groups)]
    if engine == "ray":
        return _on_ray(job, _lora, asked, progress).lora
    loras = []
    for n, one in enumerate(asked):
        loras.append(_lora(job, *one).lora)
        progress(n + 1, len(asked))
    return reduce(joined, loras)


class _Learned:
    """A LoRA that adds up."""

    def __init__(self, lora: Lora) -> None:
        self.lora = lora

    def __add__(self, other: "_Learned") -> "_Learned":
        return _Learned(joined(self.lora, other.lora))


def _part(job: Job, number: int, group: Group) -> PartialSums:
    return part_of(text_of(job), job, number, group)


def _lora(job: Job, number: int, group: Group, erasure: Path, training: Training) -> _Learned:
    state = job.state / f"alignment-{number:05d}.safetensors"
    model, onto = _model(job.model, job.dtype, job.device), load_erasure(erasure)
    return _Learned(align_group(model, onto, group, job.settings, training, state))


def text_of(job: Job) -> TextEncoder:
    """The text encoder of a job, loaded once a process."""
    return _text(job.model, job.dtype, job.device)


@lru_cache(maxsize=1)
def _text(model: str, dtype: str | None, device: str) -> TextEncoder:
    import torch

    return load_text(model, getattr(torch, dtype or "float32"), device)


@lru_cache(maxsize=1)
def _model(model: str, dtype: str | None, device: str) -> Diffusion:
    import torch

    return load_model(model, None if dtype is None else getattr(torch, dtype), device)


# ---------------------------------------------------------------- Ray


def _on_ray(
    job: Job, work: Callable[..., Any], asked: Sequence[tuple[Any, ...]], progress: Progress
) -> Any:
    """The sum of work(job, *one) over all that is asked, added two and two where the parts lie."""
    with _ray() as ray:
        gpus = 1 if job.device.startswith("cuda") else 0

        def said(*arguments: Any) -> tuple[int, Any]:
            # That a part is done, apart from it, so that to ask moves no part.
            return 1, work(job, *arguments)

        remote = ray.remote(num_returns=2, max_retries=RETRIES, num_gpus=gpus)(said)

        def added(one: Any, other: Any) -> Any:
            return one + other

        add = ray.remote(max_retries=RETRIES)(added)
        done, level = zip(*(remote.remote(*one) for one in asked), strict=True)
        while len(level) > 1:  # a tree whose shape is the same in every run
            pairs = zip(level[::2], level[1::2], strict=False)
            level = (*(add.remote(*pair) for pair in pairs), *level[len(level) // 2 * 2 :])
        waiting = list(done)
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=1.0)
                ray.get(ready)  # raises what the part raised
                progress(len(done) - len(waiting), len(done))
            return ray.get(level[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray, connected; what was started here ends here, whatever happens."""
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level="ERROR", log_to_driver=False)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def import_ray() -> Any:
    """Raises ImportError that says how to install it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "--engine ray needs Ray, which is not installed: pip install 'realera[ray]'"
        ) from error
    return ray
