"""A real ComfyUI on the CPU, controlled over HTTP.

COMFYUI_DIR names its checkout, COMFYUI_PYTHON the interpreter that runs it (by default ours).
"""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Server:
    """A running ComfyUI."""

    def __init__(self, port: int, home: Path, process: "subprocess.Popen[bytes]") -> None:
        self.address, self.home, self.process = f"http://127.0.0.1:{port}", home, process

    @property
    def output(self) -> Path:
        return self.home / "output"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path) as answer:
            return answer.read()

    def post(self, path: str, body: object = None) -> Any:
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def queue(self, graph: Mapping[str, Any]) -> str:
        return self.post("/prompt", {"prompt": graph})["prompt_id"]

    def wait(self, prompt: str, seconds: float = 900) -> dict[str, Any]:
        """The history entry of a prompt that has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = json.loads(self.get(f"/history/{prompt}"))
            if prompt in history:
                return history[prompt]
            self.check_alive()
            time.sleep(0.05)
        raise TimeoutError(f"a prompt ran longer than {seconds} s")

    def run(
        self, graph: Mapping[str, Any], seconds: float = 900
    ) -> tuple[dict[str, Any], set[str]]:
        """The outputs of a graph, and the nodes taken from the cache.

        Raises RuntimeError with ComfyUI's own words when a node fails.
        """
        entry = self.wait(self.queue(graph), seconds)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(self.error(entry) or "the prompt was interrupted")
        messages = dict(entry["status"]["messages"])
        return entry["outputs"], set(messages["execution_cached"]["nodes"])

    @staticmethod
    def error(entry: Mapping[str, Any]) -> str:
        """What the failed node of a history entry says, empty when none failed."""
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                return message["exception_message"]
        return ""

    def check_alive(self) -> None:
        """Raises RuntimeError with the end of the log when the server has died."""
        if self.process.poll() is not None:
            raise RuntimeError("ComfyUI has died: " + (self.home / "log.txt").read_text()[-3000:])

    def pixels(self, file: Mapping[str, str]) -> np.ndarray:
        """int16 [height, width, 3] of an image that a node has shown."""
        query = urllib.parse.urlencode({k: file[k] for k in ("filename", "subfolder", "type")})
        image = Image.open(io.BytesIO(self.get(f"/view?{query}"))).convert("RGB")
        return np.asarray(image, dtype=np.int16)


@contextmanager
def comfyui(home: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """A ComfyUI that runs on the CPU with the packs in home/custom_nodes and folders of its own.

    COMFYUI_FRONTEND may name a folder with another frontend than the one that it brings.
    """
    for folder in ("custom_nodes", "models/checkpoints", "input", "output", "user"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", *arguments]
    if os.environ.get("COMFYUI_FRONTEND"):
        command += ["--front-end-root", os.environ["COMFYUI_FRONTEND"]]
    command += ["--port", str(port), "--base-directory", str(home), "--disable-auto-launch"]
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=os.environ["COMFYUI_DIR"],
            env={**os.environ, "REALERA_CACHE": str(home / "cache"), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Server(port, home, process)
    try:
        for _ in range(600):
            server.check_alive()
            try:
                server.get("/system_stats")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(30)
