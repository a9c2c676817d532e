"""The bundled transformer taught to read a language model, as `language` teaches the U-Net.

    python -m tools.miniature.language_transformer [--model miniature-dit-z-image]

It reads no pooled embedding: the student's is one number, the same for every prompt, and says what
that of the empty prompt said to the teacher.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from realera.checkpoints.loading import load_model
from realera.miniature import TRANSFORMER
from realera.storage.safetensors_file import open_tensors
from realera.text.encoding import TextEncoder
from tools.layout import sd3_transformer

from . import language
from .optimizers import Average
from .runs import Stop, keep, long_run

RATES = 1e-3, 1e-3 / 3  # learning rates of new and of old weights
WARM = 30  # steps of warm-up
READ = "context_embedder", "time_text_embed.text_embedder.linear_1"  # layers that read text
CANDIDATES = 4096  # captions from which those of one length are taken


def student_of(teacher: Any, prepared: dict[str, Tensor]) -> Any:
    """The teacher with a context embedder that takes each new row for a bundled encoder's."""
    rows, bundled = prepared["rows"][::2].float(), prepared["bundled"][::2, -1].float()
    config = {k: v for k, v in dict(teacher.config).items() if not k.startswith("_")}
    config |= {"joint_attention_dim": rows.shape[-1], "pooled_projection_dim": 1}
    student: Any = SD3Transformer2DModel.from_config(config)
    state, empty = teacher.state_dict(), prepared["pooled"][0].float()
    read_as = language.bundled_row(rows, bundled), empty[:, None]
    for layer, matrix in zip(READ, read_as, strict=True):
        state[f"{layer}.weight"] = state[f"{layer}.weight"] @ matrix
    student.load_state_dict(state)
    return student


def distil(state: Path, text: TextEncoder, minutes: float, stop: Stop) -> bool:
    """The student's average, in transformer.safetensors.

    Rows of a prompt are read without padding, so that a batch is captions of one length, and beside
    them some empty ones.
    """
    torch.manual_seed(1)
    model: Any = load_model("miniature-dit")
    prepared = language.prepare(state, text, model)
    latents, captions, rows, bundled, pooled = (
        prepared[name] for name in ("latents", "captions", "rows", "bundled", "pooled")
    )
    lengths = (rows != 0).any(dim=2).sum(dim=1)
    generator = torch.Generator().manual_seed(int(time.time()))
    teacher, student = model.network, student_of(model.network, prepared)
    groups = [
        {"params": [p for n, p in student.named_parameters() if n.startswith(READ) == new]}
        for new in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, RATES[0], betas=(0.9, 0.99), weight_decay=0.0)
    average, path = Average(student, 0.99), state / "transformer.safetensors"
    batch = language.BATCH
    silent = round(batch * language.SILENT)

    def step(progress: float) -> dict[str, float]:
        decay = 1.0 if progress < 0.5 else max(0.05, (1 - progress) / 0.5)
        for group, rate in zip(optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * decay * min(1.0, (average.count + 1) / WARM)
        pick, read = language.picked(captions, CANDIDATES, generator)
        alike = (lengths[read] == lengths[read[0]]).nonzero()[:, 0]
        alike = alike[torch.arange(batch) % len(alike)]
        pick, read = pick[alike], read[alike]
        read[:silent] = 0
        u = (
            torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
        ) / batch
        s = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).mul(1.3).sigmoid()
        noise = torch.randn(latents[pick].shape, generator=generator)
        noisy = latents[pick].lerp(noise, s.view(-1, 1, 1, 1))
        one, predicted = torch.ones(batch, 1), []
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                told = bundled[read].float(), pooled[read].float()
                wanted = teacher(noisy, *told, 1000 * s).sample
            for part in (slice(silent), slice(silent, batch)):
                if len(read[part]):
                    context = rows[read[part], : lengths[read[part]].max()].float()
                    context = language.jittered(context, generator)
                    inputs = noisy[part], context, one[part], 1000 * s[part]
                    predicted.append(student(*inputs).sample)
        loss = F.mse_loss(torch.cat(predicted).float(), wanted.float())
        return language.descend(loss, student, optimizer, average)

    parts = {"student": student, "optimizer": optimizer, "average": average}
    done = long_run(state / "transformer.pt", parts, step, minutes, stop)
    keep(path, student.state_dict() | average.state_dict()["values"])
    return done


def export(state: Path, model: str, path: Path) -> None:
    """The student's average in half precision, a transformer alone in the layout of SD 3.

    model: name of the bundled model
    """
    student = load_file(state / "transformer.safetensors")
    config = json.loads(open_tensors(TRANSFORMER).metadata["config"])
    config["transformer"] |= {
        "joint_attention_dim": student[f"{READ[0]}.weight"].shape[1],
        "pooled_projection_dim": 1,
    }
    config["text_encoder"] = {"bundled": model}
    halves = {name: tensor.half() for name, tensor in sd3_transformer(student).items()}
    keep(path, halves, format="pt", config=json.dumps(config))


if __name__ == "__main__":
    language.main(distil, export, ("miniature-dit-llm", "miniature-dit-z-image"))
