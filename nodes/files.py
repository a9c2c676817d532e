"""Save Erasure, Load Erasure and Save Erased Checkpoint: files in ComfyUI's folders only."""

import os
from datetime import datetime
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io

from ..realera.checkpoints.writing import earlier_erasures, write_checkpoint
from ..realera.edit.erasure_file import load_erasure, save_erasure
from ..realera.report.model_card import write_card
from ..realera.settings import TOLERANCE
from ..realera.storage.file_names import portable
from .comfy_patch import write_lora
from .progress import tell
from .schema import BUNDLED, BUNDLED_MODELS, ErasureWire, Schema, advanced, strength_input, valid

FOLDER = "erasures"
NAME = "realera"
NO_MODEL = (
    "a LoRA file is computed from the weights of the model: connect the original MODEL, or switch "
    "'lora' off"
)
NOTHING = "nothing to save: switch 'lora' or 'erasure_file' on"
DIFFUSION_MODELS = "diffusion_models"  # folder, and prefix of its entries in the checkpoint list
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
folder_paths.add_model_folder_path(
    FOLDER, os.path.join(folder_paths.get_output_directory(), FOLDER)
)
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")  # the only kind that is listed


def new_path(folder: str, name: str, *beside: str) -> Path:
    """Path of a new file in ComfyUI's output folder, with the next free number appended.

    folder: name of the subfolder
    name: file name without number and suffix; it may include subfolders
    beside: suffixes of further new files with the same number

    Raises ValueError when the name leads out of the subfolder.
    """
    target = target_path(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        numbered = f"{target.name}_{number:05}_"
        names = [numbered + suffix for suffix in (".safetensors", *beside)]
        if not any(target.with_name(name).exists() for name in names):
            return target.with_name(names[0])
        number += 1


def state_path(name: str) -> Path:
    """Path of a training state of LoRA Align. Raises ValueError as `new_path`."""
    target = target_path("realera", name)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}.safetensors")


def target_path(folder: str, name: str) -> Path:
    """Path of a file in ComfyUI's output folder, without its number and suffix.

    Raises ValueError when the name is empty or leads out of the folder.
    """
    if not name.removesuffix(".safetensors").strip():
        raise ValueError("the file name is empty: give one such as 'no-airplane'")
    home = Path(folder_paths.get_output_directory(), folder).resolve()
    stem = portable(name.removesuffix(".safetensors"), datetime.now())
    target = (home / stem).resolve()
    if home not in target.parents:
        raise ValueError(
            f"the file name {name!r} leads out of the folder output/{folder}: give one such as "
            "'no-airplane'"
        )
    return target


class SaveErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraSaveErasure",
            display_name="Save Erasure",
            description=(
                "Saves an erasure as a LoRA file, which any LoRA loader reads, and as an erasure "
                "file, which can be merged and applied exactly."
            ),
            search_aliases=["export lora", "save lora", "save concept erasure"],
            inputs=[
                ErasureWire.Input("erasure", tooltip="Erasure to save."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Original model, whose weights the LoRA file is computed from.",
                ),
                io.String.Input(
                    "filename",
                    optional=True,
                    default=NAME,
                    tooltip=(
                        "Name of the files in ComfyUI's output folder. A number is appended and no "
                        "file is overwritten; %date:yyyy-MM-dd% becomes the date."
                    ),
                ),
                io.Boolean.Input(
                    "lora",
                    optional=True,
                    default=True,
                    tooltip=(
                        "Whether a LoRA file is written to output/loras, where LoraLoader lists "
                        "it. Requires the model."
                    ),
                ),
                io.Boolean.Input(
                    "erasure_file",
                    optional=True,
                    default=True,
                    tooltip=(
                        "Whether an erasure file is written to output/erasures, where Load Erasure "
                        "lists it."
                    ),
                ),
                advanced(
                    io.Float.Input(
                        "tolerance",
                        optional=True,
                        default=TOLERANCE,
                        min=1e-6,
                        max=0.5,
                        step=1e-6,
                        tooltip=(
                            "Largest part of the edit that the LoRA file may leave out, as a "
                            "fraction of its norm. A smaller value gives a larger file."
                        ),
                    )
                ),
            ],
            outputs=[
                io.String.Output(display_name="lora_name", tooltip="File name of the LoRA."),
                io.String.Output(display_name="erasure_name", tooltip="File name of the erasure."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        filename: str | None = NAME,
        lora: bool | None = True,
        erasure_file: bool | None = True,
        model: bool | None = False,
    ) -> bool | str:
        def check() -> (
            None
        ):  # ComfyUI passes None for linked inputs; `model` is False if not linked
            if filename is not None:
                target_path("loras", filename)
            if lora and model is False:
                raise ValueError(NO_MODEL)
            if lora is False and erasure_file is False:
                raise ValueError(NOTHING)

        return valid(check)

    @classmethod
    def execute(
        cls,
        erasure,
        filename: str = NAME,
        lora: bool = True,
        erasure_file: bool = True,
        tolerance: float = TOLERANCE,
        model=None,
    ) -> io.NodeOutput:
        lora_name = erasure_name = ""
        if lora:
            if model is None:
                raise ValueError(NO_MODEL)
            path = new_path("loras", filename)
            write_lora(model, erasure, path, tolerance)
            lora_name = _listed("loras", path)
        if erasure_file:
            path = new_path(FOLDER, filename)
            save_erasure(erasure, path)
            erasure_name = _listed(FOLDER, path)
        if not (lora or erasure_file):
            raise ValueError(NOTHING)
        folders = {"output/loras": lora_name, f"output/{FOLDER}": erasure_name}
        saved = [f"saved {folder}/{name}" for folder, name in folders.items() if name]
        return io.NodeOutput(lora_name, erasure_name, ui={"text": saved})


class LoadErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraLoadErasure",
            display_name="Load Erasure",
            description="Loads an erasure file that Save Erasure wrote, to apply or merge it.",
            search_aliases=["open erasure", "import erasure"],
            inputs=[
                io.Combo.Input(
                    "erasure_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="Erasure file in output/erasures or models/erasures.",
                )
            ],
            outputs=[
                ErasureWire.Output(
                    display_name="erasure", tooltip="Erasure to apply, merge or align."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, erasure_name: str) -> float:
        return os.path.getmtime(folder_paths.get_full_path_or_raise(FOLDER, erasure_name))

    @classmethod
    def execute(cls, erasure_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, erasure_name)
        return io.NodeOutput(load_erasure(path))


class SaveErasedCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraSaveErasedCheckpoint",
            display_name="Save Erased Checkpoint",
            description=(
                "Writes a copy of a checkpoint in which only the edited weights differ; every "
                "other tensor is copied bit for bit. LoRAs on a MODEL are not included. A "
                "model card is left beside it."
            ),
            search_aliases=["bake erasure", "export checkpoint", "save model", "merge erasure"],
            inputs=[
                ErasureWire.Input("erasure", tooltip="Erasure to apply to the checkpoint."),
                io.Combo.Input(
                    "checkpoint",
                    options=[
                        *BUNDLED_MODELS,
                        *folder_paths.get_filename_list("checkpoints"),
                        *(
                            f"{DIFFUSION_MODELS}/{name}"
                            for name in folder_paths.get_filename_list(DIFFUSION_MODELS)
                        ),
                    ],
                    default=BUNDLED,
                    tooltip=(
                        "Original checkpoint, or the file of a diffusion model alone; it is only "
                        "read."
                    ),
                ),
                io.String.Input(
                    "filename",
                    optional=True,
                    default=NAME,
                    tooltip=(
                        "Name of the new file in output/checkpoints or output/diffusion_models. A "
                        "number is appended and no file is overwritten; %date:yyyy-MM-dd% becomes "
                        "the date."
                    ),
                ),
                strength_input(
                    "edit_strength", "Strength of the closed-form edit. 0: none, 1: full."
                ),
                strength_input(
                    "lora_strength",
                    "Strength of the aligned LoRA, where the erasure has one. 0: none, 1: full.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="checkpoint_name",
                    tooltip="Name of the new file in the loaders' lists.",
                )
            ],
            view=True,
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = NAME) -> bool | str:
        return valid(lambda: filename is None or target_path("checkpoints", filename))

    @classmethod
    def execute(
        cls,
        erasure,
        checkpoint: str,
        filename: str = NAME,
        edit_strength: float = 1.0,
        lora_strength: float = 1.0,
    ) -> io.NodeOutput:
        folder, _ = _entry(checkpoint)
        path = new_path(folder, filename, ".md")
        tell(cls.hidden.unique_id, f"writing {path.name}")
        source = checkpoint_path(checkpoint)
        warnings = [f"⚠ {warning}" for warning in earlier_erasures(source)]
        write_checkpoint(
            source,
            erasure,
            path,
            edit_strength=edit_strength,
            lora_strength=lora_strength,
        )
        card = write_card(path, source)
        saved = [f"saved output/{folder}/{_listed(folder, new)}" for new in (path, card)]
        return io.NodeOutput(_listed(folder, path), ui={"text": [*warnings, *saved]})


def checkpoint_path(name: str) -> Path:
    """Path of a checkpoint-list entry."""
    if name in BUNDLED_MODELS:
        return BUNDLED_MODELS[name]
    return Path(folder_paths.get_full_path_or_raise(*_entry(name)))


def _entry(name: str) -> tuple[str, str]:
    """Folder and file name of a checkpoint-list entry."""
    if name.startswith(f"{DIFFUSION_MODELS}/"):
        return DIFFUSION_MODELS, name.removeprefix(f"{DIFFUSION_MODELS}/")
    return "checkpoints", name


def _listed(folder: str, path: Path) -> str:
    """Name of a file in the list of its folder, which ComfyUI's loaders show."""
    home = Path(folder_paths.get_output_directory(), folder).resolve()
    return str(path.relative_to(home))
