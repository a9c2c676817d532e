"""Algorithm 1 for the parts of a plan: one by one in this process, or on a Ray cluster.

The results of parts are stored in a folder, so that an interrupted run can be resumed. Ray runs the
parts, adds up their results and repeats lost ones. RAY_ADDRESS names a cluster; unless it is set, a
cluster is started on this machine.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from .algorithm import add_sums, realise, sum_parts, training_inputs, version_of
from .checkpoints.loading import load_model, load_text
from .edit.closed_form import Sums
from .edit.erasure import Erasure, Lora, joined
from .edit.erasure_file import load_erasure, save_erasure
from .mining.plan import Plan
from .mining.preservation_bank import bank_prompts
from .pipelines.interface import Diffusion
from .settings import Progress, SolveSettings, Training
from .storage.safetensors_file import digest, open_tensors, write_if_possible
from .text.encoding import TextEncoder
from .training.loop import align

RETRIES = 5  # of a part, after its worker was lost
FOLDER = ".realera-groups"  # subfolder of the output folder for the results of parts
FILE = re.compile(  # a complete file, or an unfinished one as `safetensors_file.beside` names it
    r"(?:(?:group|alignment)-\d{5,}|erasure)\.safetensors"
    r"|\.(?:(?:group|alignment)-\d{5,}|erasure)\.safetensors\.[0-9a-f]{8}-\d+\.realera-tmp"
)
TENSORS = ("gram", "shift_cov", "representatives")  # of Sums


@dataclass(frozen=True)
class Job:
    """Settings of a run, sent to every worker process.

    model, dtype, device: arguments of `checkpoints.loading.load_model`; the dtype by name
    settings: settings of the closed form
    state: folder for the results of parts
    run: hash of everything that determines a result, except the part: release, encoder, bank and
        settings
    """

    model: str
    dtype: str | None
    device: str
    settings: SolveSettings
    state: Path
    run: str = ""

    def of(self, text: TextEncoder) -> "Job":
        """The job with the hash of the run for this encoder."""
        hashed = version_of("realera"), text.fingerprint, bank_prompts(), asdict(self.settings)
        return replace(self, run=digest(*hashed))


# ---------------------------------------------------------------- sums


def summed(
    job: Job, parts: Sequence[Plan], text: TextEncoder, engine: str, progress: Progress
) -> dict[str, Sums]:
    """stream -> the sums of Eq. 7 over all parts of a plan.

    job: settings of the run
    parts: parts of the plan
    text: text encoder of this process
    engine: execution engine, "local" or "ray"
    progress: callback with (parts done, total)

    Raises ImportError when Ray is not installed, and ValueError like `sum_part`.
    """
    if engine == "ray":
        return _on_ray(job, _sum_on_worker, parts, add_sums, progress)

    def sums() -> Iterator[dict[str, Sums]]:
        for n, part in enumerate(parts):
            yield sum_part(text, job, n, part)
            progress(n + 1, len(parts))

    return reduce(add_sums, sums())


def sum_part(text: TextEncoder, job: Job, number: int, part: Plan) -> dict[str, Sums]:
    """The sums of one part, from the job's folder if an earlier run stored them.

    text: text encoder of this process
    job: settings of the run
    number: index of the part, from 0
    part: part of the plan

    Raises ValueError when this process or the stored result belongs to another run.
    """
    if job.of(text).run != job.run:
        raise ValueError(
            "a worker has another release of realera, another text encoder or another bank than "
            "the process that started the run: install the same release on all machines, with the "
            f"same file at {job.model}"
        )
    path, made_by = job.state / f"group-{number:05d}.safetensors", digest(job.run, asdict(part))
    if path.exists():
        return _read_sums(path, made_by)
    sums = sum_parts(text, part, job.settings)
    tensors = {f"{s}.{name}": getattr(of, name) for s, of in sums.items() for name in TENSORS}
    write_if_possible(path, tensors, {"run": made_by}, "an interrupted run sums this part again")
    return sums


def clear(state: Path) -> None:
    """Removes the files of a job from its folder, and the folder unless it has other files."""
    for path in state.iterdir():
        if FILE.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)
    with suppress(OSError):
        state.rmdir()


def _read_sums(path: Path, made_by: str) -> dict[str, Sums]:
    file = open_tensors(path)
    if file.metadata.get("run") != made_by:
        raise ValueError(
            f"{path} belongs to another run (other concepts, settings, model, bank, group size "
            "or release): "
            f"remove {path.parent} to start anew, or choose another --out"
        )
    streams = dict.fromkeys(key.rpartition(".")[0] for key in file.entries)
    return {s: Sums(*(file.read(f"{s}.{name}") for name in TENSORS)) for s in streams}


# ---------------------------------------------------------------- LoRAs


@dataclass(frozen=True)
class TrainedLora:
    """The concatenated LoRAs of parts.

    lora: canonical layer name -> (A, B)
    losses: step -> losses of the parts, in the order of the parts
    """

    lora: Lora
    losses: Mapping[int, Sequence[float]]

    def __add__(self, other: "TrainedLora") -> "TrainedLora":
        steps = sorted({*self.losses, *other.losses})
        losses = {n: [*self.losses.get(n, ()), *other.losses.get(n, ())] for n in steps}
        return TrainedLora(joined(self.lora, other.lora), losses)


def aligned(
    job: Job,
    parts: Sequence[Plan],
    model: Diffusion,
    erasure: Erasure,
    training: Training,
    engine: str,
    progress: Progress,
) -> TrainedLora:
    """Trains one LoRA per part of a plan (Alg. 1, l. 25-30) and concatenates them.

    Each LoRA is trained on top of the closed-form edit of all concepts, without the LoRAs of the
    other parts.

    job: settings of the run
    parts: parts of the plan
    model: model of this process
    erasure: erasure of all concepts
    training: parameters of the alignment
    engine: execution engine, "local" or "ray"
    progress: callback with (steps done, total)
    """
    steps = training.steps
    if engine == "ray":
        erasure_path = job.state / "erasure.safetensors"
        save_erasure(erasure, erasure_path, overwrite=True)
        work = partial(_align_on_worker, erasure=erasure_path, training=training)
        return _on_ray(job, work, parts, add, lambda n, total: progress(n * steps, total * steps))

    def learned() -> Iterator[TrainedLora]:
        for n, part in enumerate(parts):

            def on_step(step: int, done: int = n * steps) -> None:
                progress(done + step, len(parts) * steps)

            yield align_part(model, job, n, part, erasure, training, on_step)

    return reduce(add, learned())


def align_part(
    model: Diffusion,
    job: Job,
    number: int,
    part: Plan,
    erasure: Erasure,
    training: Training,
    on_step: Callable[[int], None] = lambda step: None,
) -> TrainedLora:
    """Alg. 1, l. 25-30 for the concepts of a part; resumes from the job's folder."""
    losses: dict[int, list[float]] = {}

    def record(step: int, loss: float) -> None:
        losses[step] = [loss]
        on_step(step)

    inputs = training_inputs(model, realise(model.text, part), erasure, training)
    state = job.state / f"alignment-{number:05d}.safetensors"
    return TrainedLora(align(model, inputs, training, on_step=record, state=state), losses)


# ---------------------------------------------------------------- Ray


def _sum_on_worker(job: Job, number: int, part: Plan) -> dict[str, Sums]:
    return sum_part(_loaded(load_text, job), job, number, part)


def _align_on_worker(
    job: Job, number: int, part: Plan, *, erasure: Path, training: Training
) -> TrainedLora:
    model = _loaded(load_model, job)
    return align_part(model, job, number, part, load_erasure(erasure), training)


@lru_cache(maxsize=2)
def _loaded(load: Callable[..., Any], job: Job) -> Any:
    return load(job.model, None if job.dtype is None else getattr(torch, job.dtype), job.device)


def _on_ray(
    job: Job,
    work: Callable[[Job, int, Plan], Any],
    parts: Sequence[Plan],
    combine: Callable[[Any, Any], Any],
    progress: Progress,
) -> Any:
    """The results of `work` for all parts, combined pairwise on the workers."""
    with _ray() as ray:
        gpus = 1 if job.device.startswith("cuda") else 0

        def worked(number: int, part: Plan) -> tuple[int, Any]:
            # The first value is waited for, to report progress without transferring the result.
            return 1, work(job, number, part)

        def combined(one: Any, other: Any) -> Any:  # Ray takes no built-in function
            return combine(one, other)

        remote = ray.remote(num_returns=2, max_retries=RETRIES, num_gpus=gpus)(worked)
        combining = ray.remote(max_retries=RETRIES)(combined)
        done, level = zip(*(remote.remote(n, part) for n, part in enumerate(parts)), strict=True)
        while len(level) > 1:  # the order of additions is the same in every run
            pairs = zip(level[::2], level[1::2], strict=False)
            level = (*(combining.remote(*pair) for pair in pairs), *level[len(level) // 2 * 2 :])
        waiting = list(done)
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=1.0)
                ray.get(ready)  # raises the exception of the part
                progress(len(done) - len(waiting), len(done))
            return ray.get(level[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray, connected. A cluster that the block starts is shut down after it."""
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        ray.init(logging_level="ERROR", log_to_driver=False)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def import_ray() -> Any:
    """The module ray. Raises ImportError with the command that installs it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "--engine ray needs Ray, which is not installed: pip install 'realera[ray]'"
        ) from error
    return ray
