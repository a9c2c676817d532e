"""LoRA Align: prediction-noise alignment (Sec. 4.3, Eq. 8-9; Alg. 1, l. 25-31)."""

from dataclasses import asdict

import torch
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..realera.algorithm import refuse_foreign, training_inputs
from ..realera.report import plots
from ..realera.settings import Training
from ..realera.training.loop import align
from .comfy_model import ComfyDiffusion, refuse_noiseless, training, whole_clone
from .comfy_patch import refuse_edited
from .files import state_path
from .page import to_image
from .preview import preview_latents, previewer
from .progress import reporter, tell
from .schema import Erasure, MiningWire, advanced, schema, seed_input

DEFAULTS = Training()
PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
PREVIEWED = 4  # concepts in a preview at most
AVERAGED = 20  # last losses in the mean that is shown


class LoraAlign(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RealEraLoraAlign",
            display_name="LoRA Align",
            description=(
                "Trains a small LoRA on top of the edit, so that the edited model draws the anchor "
                "as the original one would (RealEra, Sec. 4.3). Give it the original MODEL."
            ),
            search_aliases=[
                "train lora",
                "noise alignment",
                "fine-tune erasure",
                "concept erasure",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The original MODEL, not the edited one."),
                Erasure.Input("erasure", tooltip="From Closed-Form Edit."),
                MiningWire.Input(
                    "mining",
                    tooltip=(
                        "What the erasure was made from. Without Beyond Sampler in it Eq. 9 keeps "
                        "its first term only."
                    ),
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip=(
                        "Images of the anchors, equally many for every concept and in their order. "
                        "Without them the original model draws some."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    optional=True,
                    default=DEFAULTS.steps,
                    min=1,
                    max=100_000,
                    tooltip="Training steps; the paper takes 200.",
                ),
                io.Int.Input(
                    "rank",
                    optional=True,
                    default=DEFAULTS.rank,
                    min=1,
                    max=128,
                    tooltip="Rank of the LoRA: how much it can learn, and how large its file is.",
                ),
                io.Float.Input(
                    "learning_rate",
                    optional=True,
                    default=DEFAULTS.learning_rate,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="Step size of the optimiser; the paper takes 1e-5.",
                ),
                io.Int.Input(
                    "batch",
                    optional=True,
                    default=DEFAULTS.batch,
                    min=1,
                    max=64,
                    tooltip="Prompts per step. Lower it when memory runs out.",
                ),
                advanced(
                    io.Int.Input(
                        "images",
                        optional=True,
                        default=8,
                        min=1,
                        max=256,
                        tooltip="Images of every anchor to draw when no LATENT is given.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "precision",
                        optional=True,
                        options=list(PRECISIONS),
                        default="auto",
                        tooltip=(
                            "What the model computes in. auto: as ComfyUI draws. float32 "
                            "needs more memory and never overflows."
                        ),
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "gradient_checkpointing",
                        optional=True,
                        default=DEFAULTS.gradient_checkpointing,
                        tooltip=(
                            "Needs much less memory and up to half more time, for the same LoRA. "
                            "It comes on by itself where the free memory would not do without it."
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
                            "Steps between two previews: the concept as the model draws it by "
                            "then, from the same noise. 0: none. The LoRA is the same either way."
                        ),
                    )
                ),
                advanced(
                    io.String.Input(
                        "resume",
                        optional=True,
                        default="",
                        placeholder="name of a saved state",
                        tooltip=(
                            "A name to keep the training state under, in output/realera. A run "
                            "that was cancelled goes on from there. Empty: keep none."
                        ),
                    )
                ),
                seed_input("The same seed trains the same LoRA."),
                advanced(
                    io.Int.Input(
                        "adversarial",
                        optional=True,
                        default=DEFAULTS.adversarial,
                        min=0,
                        max=256,
                        tooltip=(
                            "Contexts that are sought between the steps, by gradient, to bring the "
                            "concept back, and then aligned. Try 12 with rank 16, a learning rate "
                            "of 5e-4 and a batch of 12; a step takes several times as long. 0: "
                            "none, as in the paper."
                        ),
                    )
                ),
            ],
            outputs=[
                Erasure.Output(display_name="erasure", tooltip="The erasure with its LoRA."),
                io.Image.Output(display_name="loss", tooltip="The loss of every step."),
            ],
            view=True,
            alone=False,
        )

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
        run = Training(
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
        # Before the network is loaded to be trained, since drawing and encoding may unload it.
        inputs = training_inputs(diffusion, mining, erasure, run, anchors, images)

        losses: dict[int, float] = {}
        report = reporter(node, "aligning")
        prompts = pairs.e.take(pairs.first[: min(batch, PREVIEWED)])
        empty = mining.text.encode([""])
        noise = torch.randn(inputs.anchors.shape[2:], generator=torch.Generator().manual_seed(seed))
        painter = previewer(model) if preview_every else None

        def on_step(step: int, loss: float) -> None:
            losses[step] = loss
            server = PromptServer.instance
            step_made = {"node": node, "step": step, "steps": steps, "loss": loss}
            server.send_sync("realera.step", step_made, server.client_id)
            preview = None
            if painter is not None and step % preview_every == 0:
                with torch.no_grad():
                    latents = preview_latents(diffusion, erasure, prompts, empty, noise)
                    row = torch.cat(list(latents), dim=-1)[None]  # side by side
                    preview = painter.decode_latent_to_preview_image("JPEG", row)
            report(step, steps, preview)

        state = state_path(resume) if resume else None
        with training(model):
            lora = align(diffusion, inputs, run, on_step=on_step, state=state)
        picture = to_image(plots.loss_curve(losses))
        last = list(losses.values())[-AVERAGED:]
        summary = f"{steps} steps, the last {len(last)} with a loss of {sum(last) / len(last):.4f}"
        shown = {"realera_loss": list(losses.items()), "text": [summary]}
        aligned = erasure.with_lora(lora, asdict(run))
        return io.NodeOutput(aligned, picture, ui=shown)


def _by_concept(samples: Tensor, concepts: int) -> Tensor:
    """[n, channels, h, w] -> [concepts, n / concepts, channels, h, w]."""
    if len(samples) % concepts:
        raise ValueError(
            f"{len(samples)} latents for {concepts} concepts: give equally many images of every "
            "anchor, in the order of the concepts"
        )
    return samples.unflatten(0, (concepts, -1))
