"""Progress bars, time-left text and cancellation through ComfyUI."""

import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from server import PromptServer


def reporter(node_id: str | None, what: str) -> Callable[..., None]:
    """A callback (done, total, preview=None) that shows progress and raises on Cancel.

    what: description of the work, such as "mining"
    """
    bar = comfy.utils.ProgressBar(1)
    started, last = time.monotonic(), 0

    def report(done: int, total: int, preview: Any = None) -> None:
        nonlocal started, last
        comfy.model_management.throw_exception_if_processing_interrupted()
        if done < last:  # another stage
            started = time.monotonic()
        last = done
        bar.update_absolute(done, total, preview)
        left = (time.monotonic() - started) / max(done, 1) * (total - done)
        tell(node_id, f"{what}: {done} of {total}, {_clock(left)} left")

    return report


def tell(node_id: str | None, text: str) -> None:
    """Shows a line of text on a running node, in the browser tab that started the run."""
    server = PromptServer.instance
    if node_id is not None and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
