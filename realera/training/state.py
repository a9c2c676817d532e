"""The file that a cancelled alignment is resumed from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from ..edit.erasure import Lora
from ..pipelines.interface import Diffusion
from ..settings import Training
from ..storage.safetensors_file import digest, open_tensors, write_if_possible
from .adversarial import Contexts
from .inputs import TrainingInputs

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass
class TrainingState:
    """Everything that a step changes, and the file that it is saved to.

    path: safetensors file; None saves nothing
    run: `run_id` of the run that the file belongs to
    lora, optimizer: the trained factors, and the AdamW that trains them
    losses: loss of every step done
    contexts: contexts of adversarial training, None before the first step and without it
    """

    path: Path | None
    run: str
    lora: Lora
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    contexts: Contexts | None = None
    complete: bool = True  # False while a step is changing the weights

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self.losses)

    def load(self, steps: int) -> None:
        """Loads the file if there is one.

        steps: number of steps of the whole run. Raises ValueError when the file holds more, and
        when it is damaged or belongs to another run.
        """
        if self.path is None or not self.path.exists():
            return
        stored = open_tensors(self.path)  # raises ValueError, naming the file, when it is damaged
        if stored.metadata.get("run") != self.run or "losses" not in stored.entries:
            raise ValueError(
                f"{self.path} is the state of another run (other concepts, ranges, model or "
                "training settings): remove it or name another file to start afresh"
            )
        self.losses = stored.read("losses").tolist()
        if self.step > steps:
            raise ValueError(
                f"{self.path} holds {self.step} steps and {steps} were asked for: ask for more, or "
                "name another file to start afresh"
            )
        for key, weight in self._weights():
            weight.data = stored.read(key).to(weight)
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(self.step)),
                **{moment: stored.read(f"{key}.{moment}").to(weight) for moment in MOMENTS},
            }
        names = [each.name for each in fields(Contexts)]
        if f"contexts.{names[0]}" in stored.entries:
            self.contexts = Contexts(*(stored.read(f"contexts.{name}") for name in names))

    def save(self) -> None:
        if self.path is None:
            return
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        if self.contexts is not None:
            contexts = vars(self.contexts).items()
            tensors |= {f"contexts.{name}": rows.cpu() for name, rows in contexts}
        for key, weight in self._weights():
            tensors[key] = weight.detach().cpu().contiguous()
            for moment in MOMENTS:
                tensors[f"{key}.{moment}"] = self.optimizer.state[weight][moment].cpu()
        without = "if this run is interrupted, it starts afresh"
        write_if_possible(self.path, tensors, {"run": self.run}, without)

    @contextmanager
    def updating(self, loss: float, contexts: Contexts | None) -> Iterator[None]:
        """Marks the block in which a step changes the weights: what it leaves is never saved
        unless it ends."""
        self.complete = False
        yield
        self.losses.append(loss)
        self.contexts, self.complete = contexts, True

    @contextmanager
    def when_interrupted(self) -> Iterator[None]:
        """Saves the last complete step when the block is left by an exception, except when the
        training itself failed."""
        try:
            yield
        except FloatingPointError:
            raise
        except BaseException:
            if self.step and self.complete:
                self.save()
            raise

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, pair in self.lora.items():
            for letter, weight in zip("AB", pair, strict=True):
                yield f"{name}.{letter}", weight


def run_id(model: Diffusion, inputs: TrainingInputs, training: Training) -> str:
    """Hash of everything that decides the trained LoRA: a run resumes a state of the same hash."""
    free = {"steps": 0, "save_every": 0, "gradient_checkpointing": False}  # may change between runs
    neighbourhood, generator = inputs.neighbourhood, torch.Generator().manual_seed(training.seed)
    # A draw of each kind tells neighbourhoods apart: their ranges, noise and words.
    drawn = [neighbourhood.neighbors(1, generator)]
    drawn += [neighbourhood.beyond(1, generator)] if inputs.beyond else []
    adversarial = inputs.adversarial
    return digest(
        model.fingerprint,
        {**asdict(training), **free},
        *(part for mined in drawn for part in (mined.words, mined.e, mined.target)),
        neighbourhood.pairs.anchor,
        {stream: edit.matrix for stream, edit in inputs.erasure.edits.items()},
        *inputs.erasure.lora.values(),
        inputs.anchors,
        *(
            []
            if adversarial is None
            else [adversarial.images, adversarial.words, adversarial.preserved]
        ),
    )
