"""The state of an alignment, and the file to resume it from."""

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
    """Everything that a step changes.

    path: safetensors file; None saves nothing
    run: `run_id` of the run that the file belongs to
    lora, optimizer: trained factors and their AdamW
    losses: losses of all finished steps
    contexts: contexts of adversarial training; None before the first step
    complete: whether no step is changing the weights
    """

    path: Path | None
    run: str
    lora: Lora
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    contexts: Contexts | None = None
    complete: bool = True

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return len(self.losses)

    def load(self, steps: int) -> None:
        """Loads the file if it exists.

        steps: number of steps of the whole run

        Raises ValueError when the file has more steps, is damaged or belongs to another run.
        """
        if self.path is None or not self.path.exists():
            return
        stored = open_tensors(self.path)  # raises ValueError, naming the file, when it is damaged
        if stored.metadata.get("run") != self.run or "losses" not in stored.entries:
            raise ValueError(
                f"{self.path} is the state of another run (other concepts, ranges, model or "
                "training settings): remove it or name another file to start anew"
            )
        self.losses = stored.read("losses").tolist()
        if self.step > steps:
            raise ValueError(
                f"{self.path} has {self.step} steps and steps = {steps}: increase steps, or name "
                "another file to start anew"
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
        without = "an interrupted run starts anew"
        write_if_possible(self.path, tensors, {"run": self.run}, without)

    @contextmanager
    def updating(self, loss: float, contexts: Contexts | None) -> Iterator[None]:
        """Marks the block in which a step changes the weights; a state within it is never saved."""
        self.complete = False
        yield
        self.losses.append(loss)
        self.contexts, self.complete = contexts, True

    @contextmanager
    def when_interrupted(self) -> Iterator[None]:
        """Saves the last complete step when an exception leaves the block, except a
        FloatingPointError."""
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


def steps_in(path: Path | None) -> int:
    """Number of finished steps in the file of a state; 0 without a file."""
    if path is None or not path.exists():
        return 0
    losses = open_tensors(path).entries.get("losses")
    return losses.shape[0] if losses else 0


def run_id(model: Diffusion, inputs: TrainingInputs, training: Training) -> str:
    """Hash of everything that determines the trained LoRA."""
    free = {"steps": 0, "save_every": 0, "gradient_checkpointing": False}  # may change between runs
    neighbourhood, generator = inputs.neighbourhood, torch.Generator().manual_seed(training.seed)
    # One draw of each kind depends on ranges, noise and words of the neighbourhood.
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
