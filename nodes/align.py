"""LoRA Align: prediction-noise alignment (Sec. 4.3, Eq. 8-9; Alg. 1, l. 25-30)."""

from dataclasses import asdict

import torch
from comfy_api.v0_0_2 import io
from server import PromptServer
from torch import Tensor

from ..realera.algorithm import refuse_foreign, training_inputs
from ..realera.report import plots
from ..realera.settings import Training
from ..realera.training.loop import align
from ..realera.training.state import steps_in
from .comfy_model import ComfyDiffusion, refuse_noiseless, training, whole_clone
from .comfy_patch import refuse_edited
from .files import state_path, target_path
from .page import to_image
from .preview import preview_latents, previewer
from .progress import reporter, tell
from .schema import ALIASES, ErasureWire, MiningWire, Schema, advanced, seed_input, valid

DEFAULTS = Training()
PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_PREVIEWS = 4  # concepts in a preview
LOSS_WINDOW = 20  # losses in the mean that is shown


class LoraAlign(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraLoraAlign",
            display_name="LoRA Align",
            description=(
                "Trains a small LoRA on top of the edit, so that the edited model predicts for the "
                "concept what the original model predicts for the anchor (RealEra, Sec. 4.3). "
                "Connect the original MODEL."
            ),
            search_aliases=[*ALIASES, "train lora", "noise alignment", "fine-tune erasure"],
            inputs=[
                io.Model.Input("model", tooltip="Original model, not the edited one."),
                ErasureWire.Input("erasure", tooltip="Erasure from Closed-Form Edit."),
                MiningWire.Input(
                    "mining",
                    tooltip=(
                        "Mining that the erasure was made from. If it has no beyond points, only "
                        "the first term of Eq. 9 is trained."
                    ),
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip=(
                        "Images of the anchors, equally many for every concept and in the order of "
                        "the concepts. Without them the original model draws some."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    optional=True,
                    default=DEFAULTS.steps,
                    min=1,
                    max=100_000,
                    tooltip="Training steps; 200 in the paper.",
                ),
                io.Int.Input(
                    "rank",
                    optional=True,
                    default=DEFAULTS.rank,
                    min=1,
                    max=128,
                    tooltip=(
                        "Rank of the LoRA, which decides how much it can learn and how large its "
                        "file is."
                    ),
                ),
                io.Float.Input(
                    "learning_rate",
                    optional=True,
                    default=DEFAULTS.learning_rate,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="Learning rate of the optimiser; 1e-5 in the paper.",
                ),
                io.Int.Input(
                    "batch",
                    optional=True,
                    default=DEFAULTS.batch,
                    min=1,
                    max=64,
                    tooltip="Prompts per training step. Lower it when memory runs out.",
                ),
                advanced(
                    io.Int.Input(
                        "images",
                        optional=True,
                        default=8,
                        min=1,
                        max=256,
                        tooltip=(
                            "Number of images to draw of each anchor when no latents are connected."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "precision",
                        optional=True,
                        options=list(PRECISIONS),
                        default="auto",
                        tooltip=(
                            "Data type of the computation. auto: the data type that ComfyUI uses "
                            "for sampling. float32: more memory, no overflow."
                        ),
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "gradient_checkpointing",
                        optional=True,
                        default=DEFAULTS.gradient_checkpointing,
                        tooltip=(
                            "Whether activations are recomputed in the backward pass: much less "
                            "memory and up to half more time, for the same LoRA. Switched on "
                            "automatically where the free memory requires it."
                        ),
                    )
                ),
                advanced(
                    io.Int.Input(
                        "preview_every",
                        optional=True,
                        default=25,
                        min=0,
                        max=100_000,
                        tooltip=(
                            "Number of steps between previews. A preview draws the concepts with "
                            "the current LoRA, always from the same noise. 0: no previews. The "
                            "trained LoRA is the same either way."
                        ),
                    )
                ),
                advanced(
                    io.String.Input(
                        "resume",
                        optional=True,
                        default="",
                        placeholder="name of a training state",
                        tooltip=(
                            "Name of a training state in output/realera, from which a cancelled "
                            "run resumes. Empty: no state is saved."
                        ),
                    )
                ),
                seed_input("Seed of the training; the same seed trains the same LoRA."),
                advanced(
                    io.Int.Input(
                        "adversarial",
                        optional=True,
                        default=DEFAULTS.adversarial,
                        min=0,
                        max=256,
                        tooltip=(
                            "Number of adversarial contexts: embeddings that bring the concept "
                            "back, found by gradient between the steps and then aligned to the "
                            "anchor. Try 12 with rank 16, learning rate 5e-4 and batch 12; a step "
                            "takes several times as long. 0: none, as in the paper."
                        ),
                    )
                ),
            ],
            outputs=[
                ErasureWire.Output(
                    display_name="erasure", tooltip="Erasure with the trained LoRA."
                ),
                io.Image.Output(display_name="loss", tooltip="Chart of the loss of every step."),
            ],
            view=True,
            alone=False,
        )

    @classmethod
    def validate_inputs(cls, resume: str | None = "") -> bool | str:
        return valid(lambda: not resume or target_path("realera", resume))

    @classmethod
    def execute(
        cls,
        model,
        erasure,
        mining,
        steps: int = DEFAULTS.steps,
        rank: int = DEFAULTS.rank,
        learning_rate: float = DEFAULTS.learning_rate,
        batch: int = DEFAULTS.batch,
        images: int = 8,
        precision: str = "auto",
        gradient_checkpointing: bool = DEFAULTS.gradient_checkpointing,
        preview_every: int = 25,
        resume: str = "",
        seed: int = DEFAULTS.seed,
        adversarial: int = DEFAULTS.adversarial,
        latents: dict | None = None,
    ) -> io.NodeOutput:
        node = cls.hidden.unique_id
        settings = Training(
            steps,
            rank,
            learning_rate,
            batch,
            seed,
            gradient_checkpointing=gradient_checkpointing,
            adversarial=adversarial,
        )
        refuse_edited(model, erasure)  # before anything is drawn
        refuse_foreign(erasure, mining)
        refuse_noiseless(model)
        model = whole_clone(model)
        if PRECISIONS[precision] is not None:
            model.set_model_compute_dtype(PRECISIONS[precision])
        diffusion, pairs = ComfyDiffusion(model, mining.text), mining.pairs
        if resume and diffusion.fingerprint is None:
            raise ValueError(
                "'resume' cannot tell this MODEL from another one, since a node such as FreeU, "
                "IPAdapter or PerturbedAttentionGuidance changed how it computes: connect the "
                "MODEL from before that node, or leave 'resume' empty"
            )
        anchors = None
        if latents is not None:
            anchors = _by_concept(diffusion.encoded(latents["samples"]), len(pairs.concepts))
        if latents is None or adversarial:
            tell(node, "drawing images to train on")
        # Draw and encode before the network is loaded for training, because both may unload it.
        inputs = training_inputs(diffusion, mining, erasure, settings, anchors, images)

        losses: dict[int, float] = {}
        report = reporter(node, "aligning")
        prompts = pairs.e.take(pairs.first[: min(batch, MAX_PREVIEWS)])
        empty = mining.text.encode([""])
        noise = torch.randn(inputs.anchors.shape[2:], generator=torch.Generator().manual_seed(seed))
        latent_previewer = previewer(model) if preview_every else None
        state = state_path(resume) if resume else None
        resumed = steps_in(state)  # their losses are reported again, with no preview

        def on_step(step: int, loss: float) -> None:
            losses[step] = loss
            server = PromptServer.instance
            progress = {"node": node, "step": step, "steps": steps, "loss": loss}
            server.send_sync("realera.step", progress, server.client_id)
            preview = None
            if latent_previewer is not None and step % preview_every == 0 and step > resumed:
                with torch.no_grad():
                    latents = preview_latents(diffusion, erasure, prompts, empty, noise)
                    row = torch.cat(list(latents), dim=-1)[None]  # side by side
                    preview = latent_previewer.decode_latent_to_preview_image("JPEG", row)
            report(step, steps, preview)

        with training(model):
            lora = align(diffusion, inputs, settings, on_step=on_step, state=state)
        picture = to_image(plots.loss_curve(losses))
        last = list(losses.values())[-LOSS_WINDOW:]
        sentence = f"{steps} steps; mean loss of the last {len(last)}: {sum(last) / len(last):.4f}"
        view = {"realera_loss": list(losses.items()), "text": [sentence]}
        aligned = erasure.with_lora(lora, asdict(settings))
        return io.NodeOutput(aligned, picture, ui=view)


def _by_concept(samples: Tensor, concepts: int) -> Tensor:
    """Groups latents [n, channels, h, w] by concept: [concepts, n / concepts, channels, h, w]."""
    if len(samples) % concepts:
        raise ValueError(
            f"{len(samples)} latents for {concepts} concepts: connect equally many images of every "
            "anchor, in the order of the concepts"
        )
    return samples.unflatten(0, (concepts, -1))
