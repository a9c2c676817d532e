"""Training runs that can be stopped and resumed at any time."""

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera.storage.safetensors_file import write_tensors, writing

SAVE_SECONDS = 120


class Stop:
    """Turns true once the process is asked to end."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def keep(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """A safetensors file, atomically, over one that may be there."""
    with writing(path, overwrite=True) as temporary:
        write_tensors(temporary, tensors, metadata)


def long_run(
    path: Path,
    parts: dict[str, Any],
    step: Callable[[float], dict[str, float]],
    minutes: float,
    stop: Stop,
) -> bool:
    """Call `step(progress)` until `minutes` of training are spent; true when they are.

    `parts` (anything with state_dict) are resumed from `path` and saved there every two minutes;
    progress runs from 0 to 1; the numbers that a step returns are averaged into `path`.csv.
    """
    spent, steps = 0.0, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        spent, steps = state["spent"], state["steps"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    total = 60 * minutes
    last, saved, sums, count = time.monotonic(), time.monotonic(), dict[str, float](), 0
    while spent < total and not stop.asked:
        for name, value in step(spent / total).items():
            sums[name] = sums.get(name, 0.0) + value
        steps, count, now = steps + 1, count + 1, time.monotonic()
        spent, last = spent + now - last, now
        if count == 100:
            means = " ".join(f"{name}={value / count:.4f}" for name, value in sums.items())
            print(f"{path.stem} {spent / 60:.1f} min, step {steps}: {means}", flush=True)
            table = path.with_suffix(".csv")
            if not table.exists():
                table.write_text(",".join(["seconds", "steps", *sums]) + "\n")
            with table.open("a") as log:
                row = [f"{spent:.0f}", str(steps), *(f"{v / count:.5f}" for v in sums.values())]
                log.write(",".join(row) + "\n")
            sums, count = {}, 0
        if now - saved > SAVE_SECONDS or spent >= total or stop.asked:
            state = {name: part.state_dict() for name, part in parts.items()}
            with writing(path, overwrite=True) as temporary:
                torch.save({"spent": spent, "steps": steps, **state}, temporary)
            saved = last = time.monotonic()
    return spent >= total
