"""Compare: draws the same prompts and seeds with several models and classifies the images."""

from pathlib import Path

import comfy.samplers
import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..realera.concepts import lines
from ..realera.evaluation.scorers import Clip, ClipScore, NudeNet, clip_classifier
from ..realera.evaluation.tasks import CIFAR10, OBJECT
from ..realera.pipelines.interface import latents_at_once
from ..realera.report.plots import grid
from .comfy_model import ComfyDiffusion
from .comfy_transformer_text import text_of
from .page import to_image
from .progress import tell
from .schema import ClassifierWire, Schema, advanced, growing, seed_input, valid

MORE = ["sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraCompare",
            display_name="Compare",
            description=(
                "Draws every prompt with every model from the same noise, side by side, and "
                "shows what a classifier sees in each image."
            ),
            search_aliases=["before after", "grid", "side by side", "xy plot", "evaluate erasure"],
            inputs=[
                io.Model.Input("before", tooltip="The original model."),
                io.Model.Input("after", tooltip="The erased model."),
                io.Model.Input("third", optional=True, tooltip="A third model to compare."),
                io.Model.Input("fourth", optional=True, tooltip="A fourth model to compare."),
                io.Model.Input("fifth", optional=True, tooltip="A fifth model to compare."),
                *growing(io.Model.Input("model", optional=True), MORE, "More models to compare."),
                io.Clip.Input("clip", tooltip="The text encoder that the models share."),
                io.Vae.Input("vae", tooltip="The autoencoder that the models share."),
                ClassifierWire.Input(
                    "classifier",
                    optional=True,
                    tooltip=(
                        "A classifier from Bundled Model, CLIP Classifier or NudeNet, which "
                        "describes each image."
                    ),
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of the airplane\na photo of the jet\na photo of the dog",
                    tooltip=(
                        "Prompts, one per line: for the concept, for what implies it, and for what "
                        "should stay."
                    ),
                ),
                io.String.Input(
                    "names",
                    optional=True,
                    default="before, after",
                    tooltip="Names of the models, separated by commas.",
                ),
                io.Int.Input(
                    "seeds", optional=True, default=2, min=1, max=16, tooltip="Images per prompt."
                ),
                seed_input(
                    "Seed of the first image of each prompt; further images use seed + 1, seed + 2 "
                    "and so on."
                ),
                io.Int.Input(
                    "steps", optional=True, default=20, min=1, max=200, tooltip="Sampling steps."
                ),
                io.Float.Input(
                    "cfg",
                    optional=True,
                    default=5.0,
                    min=1.0,
                    max=30.0,
                    step=0.5,
                    tooltip=(
                        "Classifier-free guidance scale: how strictly the image follows the prompt."
                    ),
                ),
                advanced(
                    io.Int.Input(
                        "size",
                        optional=True,
                        default=0,
                        min=0,
                        max=4096,
                        step=8,
                        tooltip=(
                            "Width and height of an image in pixels. 0: the size that the model "
                            "was trained on."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "sampler",
                        optional=True,
                        options=comfy.samplers.KSampler.SAMPLERS,
                        default="ddim",
                        tooltip="The sampler, as in KSampler.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "scheduler",
                        optional=True,
                        options=comfy.samplers.KSampler.SCHEDULERS,
                        default="ddim_uniform",
                        tooltip="The noise schedule, as in KSampler.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All images with their labels."),
                io.Image.Output(display_name="before", tooltip="The first model's images."),
                io.Image.Output(display_name="after", tooltip="The second model's images."),
                io.String.Output(
                    display_name="verdict",
                    tooltip="What the classifier sees in each image, one line per image.",
                ),
            ],
            view=True,
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None, more: object = None) -> bool | str:
        return valid(lambda: prompts is None or prompts_in(prompts))

    @classmethod
    def execute(
        cls,
        before,
        after,
        clip,
        vae,
        prompts: str,
        names: str = "before, after",
        seeds: int = 2,
        seed: int = 0,
        steps: int = 20,
        cfg: float = 5.0,
        size: int = 0,
        sampler: str = "ddim",
        scheduler: str = "ddim_uniform",
        third=None,
        fourth=None,
        fifth=None,
        more=None,
        classifier=None,
    ) -> io.NodeOutput:
        texts = prompts_in(prompts)
        models = [before, after, third, fourth, fifth, *(more or {}).values()]
        models = [model for model in models if model is not None]
        labels = [name.strip() for name in names.split(",") if name.strip()]
        labels += [f"model {number}" for number in range(len(labels) + 1, len(models) + 1)]
        labels = labels[: len(models)]
        text = text_of(clip, before)
        image_prompts = [prompt for prompt in texts for _ in range(seeds)]
        encoding, negative = text.encode(texts), text.encode([""])
        images = []  # [prompts * seeds, 3, height, width] of every model
        for label, model in zip(labels, models, strict=True):
            tell(cls.hidden.unique_id, f"drawing with {label}")
            diffusion = ComfyDiffusion(model, text, vae)
            noise = _noise(diffusion, size, range(seed, seed + seeds))
            batches = torch.arange(len(image_prompts)).split(latents_at_once(*noise.shape[2:]))
            decoded = [
                diffusion.decode(
                    diffusion.denoise(
                        encoding.take(batch // seeds),
                        negative,
                        noise[batch % seeds],
                        steps,
                        cfg,
                        sampler,
                        scheduler,
                        seed + int(batch[0]),  # seed of ancestral and SDE samplers
                    )
                )
                for batch in batches
            ]
            images.append(torch.cat(decoded))

        described = [classifier.describe(drawn, image_prompts) for drawn in images if classifier]
        verdict = "\n".join(
            f"{label}, {prompt}: {line}"
            for label, descriptions in zip(labels, described, strict=False)
            for prompt, line in zip(image_prompts, descriptions, strict=True)
        )
        side = max(96, min(256, images[0].shape[-1]))
        picture = to_image(
            grid([list(drawn) for drawn in images], labels, image_prompts, size=side)
        )
        tensors = [drawn.movedim(1, -1) for drawn in images]
        first, second = tensors[:2]
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        files = [ui.PreviewImage(tensor, cls=cls).as_dict()["images"] for tensor in tensors]
        shown["realera_models"] = labels
        shown["realera_images"] = [
            {
                "prompt": prompt,
                "files": [of_model[k] for of_model in files],
                "verdicts": [of_model[k] for of_model in described],
            }
            for k, prompt in enumerate(image_prompts)
        ]
        return io.NodeOutput(picture, first, second, verdict, ui=shown)


def prompts_in(text: str) -> list[str]:
    """The prompts of a text, one per line. Raises ValueError when there is none.

    text: content of the widget
    """
    if not (found := lines(text)):
        raise ValueError("no prompt to draw: write one per line")
    return found


def _noise(diffusion: ComfyDiffusion, size: int, seeds: range) -> Tensor:
    """One latent of noise per seed, the same for every model and prompt."""
    channels, *sides = diffusion.latent_shape
    shape = (channels, *(size // diffusion.pixels_per_latent or side for side in sides))
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class ClipClassifier(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraClipClassifier",
            display_name="CLIP Classifier",
            description=(
                "Classifies images by CLIP, without training, into the classes that you "
                "name, as the paper measures erasures."
            ),
            search_aliases=["zero-shot", "clip score", "recognise", "evaluate erasure", "judge"],
            inputs=[
                io.Combo.Input(
                    "clip_folder",
                    options=list(_clip_folders()),
                    tooltip=(
                        "Folder in models/clip_vision with a whole CLIP model, its text and its "
                        "image encoder: config.json, model.safetensors and the other files of its "
                        "Hugging Face page."
                    ),
                ),
                io.String.Input(
                    "classes",
                    optional=True,
                    multiline=True,
                    default="\n".join(CIFAR10),
                    tooltip=(
                        "Classes, one per line: the concept, and what may be drawn in its place. "
                        "Empty: the CLIP score of each image and its prompt."
                    ),
                ),
                io.String.Input(
                    "template",
                    optional=True,
                    default=OBJECT,
                    tooltip="Prompt for a class; {} stands for its name.",
                ),
            ],
            outputs=[
                ClassifierWire.Output(
                    display_name="classifier", tooltip="The classifier, for Compare."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, classes: str | None = "\n".join(CIFAR10), template: str | None = OBJECT
    ) -> bool | str:
        return valid(lambda: classes is None or template is None or classes_in(classes, template))

    @classmethod
    def execute(
        cls, clip_folder: str, classes: str = "\n".join(CIFAR10), template: str = OBJECT
    ) -> io.NodeOutput:
        names = classes_in(classes, template)
        clip = Clip(_clip_folders()[clip_folder])
        return io.NodeOutput(clip_classifier(clip, names, template) if names else ClipScore(clip))


def classes_in(text: str, template: str) -> list[str]:
    """The classes of a text, one per line.

    text: content of the widget
    template: prompt for a class

    Raises ValueError for a single class, and for a template without {}.
    """
    names = list(dict.fromkeys(lines(text)))
    if len(names) == 1:
        raise ValueError(
            f"{names[0]!r} is the only class: write at least two, one per line, or none for "
            "the CLIP score"
        )
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} for the class: add it")
    return names


def _clip_folders() -> dict[str, Path]:
    """The folders of whole CLIPs in ComfyUI's clip_vision folders, by name."""
    return {
        str(file.parent.relative_to(home)): file.parent
        for home in map(Path, folder_paths.get_folder_paths("clip_vision"))
        for file in sorted(home.glob("*/model.safetensors"))
        if (file.parent / "config.json").is_file()
    }


class NudeNetDetector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraNudeNet",
            display_name="NudeNet",
            description=(
                "Counts detections of explicit content in each image by NudeNet, as the "
                "paper measures its erasure."
            ),
            search_aliases=["explicit content", "nudity", "nsfw", "detector", "evaluate erasure"],
            inputs=[
                io.Float.Input(
                    "threshold",
                    optional=True,
                    default=0.6,
                    min=0.2,
                    max=1.0,
                    step=0.05,
                    tooltip="Confidence from which a detection counts.",
                )
            ],
            outputs=[
                ClassifierWire.Output(
                    display_name="classifier", tooltip="The classifier, for Compare."
                )
            ],
        )

    @classmethod
    def execute(cls, threshold: float = 0.6) -> io.NodeOutput:
        return io.NodeOutput(NudeNet(threshold=threshold))
