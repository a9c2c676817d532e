"""Closed-Form Edit (Eq. 7; Alg. 1, l. 24), Apply Erasure (l. 31) and Merge Erasures."""

from functools import partial

import comfyui_version
from comfy_api.v0_0_2 import io

from ..realera.algorithm import erase, scope_report
from ..realera.edit.erasure import Erasure
from ..realera.edit.text_layers import family_in
from ..realera.evaluation.coarse_samples import coarse_samples
from ..realera.report import plots, scope
from ..realera.settings import MAX_SUPPRESSION, SolveSettings
from .comfy_model import ComfyDiffusion
from .comfy_patch import apply_erasure
from .comfy_transformer_text import refuse_other_family
from .page import to_image
from .progress import reporter
from .schema import ALIASES, ErasureWire, MiningWire, Schema, advanced, growing, strength_input

DEFAULTS = SolveSettings()
MORE = ["fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]


class ClosedFormEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraClosedFormEdit",
            display_name="Closed-Form Edit",
            description=(
                "Computes the matrix that maps the concept and its neighbours to the anchor and "
                "preserves everything else (RealEra, Eq. 7). Takes seconds. The edited model can "
                "be used immediately."
            ),
            search_aliases=[*ALIASES, "concept erasure", "UCE", "closed form"],
            inputs=[
                io.Model.Input("model", tooltip="Model to edit; it is left unchanged."),
                MiningWire.Input(
                    "mining",
                    tooltip="Mining from Neighbor Sampler or Beyond Sampler.",
                ),
                advanced(
                    io.Float.Input(
                        "lambda1",
                        optional=True,
                        display_name="preservation (λ1)",
                        default=DEFAULTS.lambda1,
                        min=0.0,
                        max=100.0,
                        step=0.01,
                        tooltip=(
                            "Weight of the preserved prompts (λ1); a larger value preserves more "
                            "and erases less."
                        ),
                    )
                ),
                advanced(
                    io.Float.Input(
                        "lambda2",
                        optional=True,
                        display_name="regularisation (λ2)",
                        default=DEFAULTS.lambda2,
                        min=1e-6,
                        max=1.0,
                        step=1e-6,
                        tooltip=(
                            "Weight of the regularisation towards the original weights (λ2), which "
                            "keeps Eq. 7 solvable."
                        ),
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "bank",
                        optional=True,
                        display_name="preservation bank",
                        default=DEFAULTS.bank,
                        tooltip=(
                            "Whether a bank of about 1,000 everyday prompts is preserved as well, "
                            "and the other thing in a prompt with the concept. Without it, the "
                            "edit changes much that is not to be erased."
                        ),
                    )
                ),
                advanced(
                    io.Int.Input(
                        "check",
                        optional=True,
                        display_name="check by drawing",
                        default=0,
                        min=0,
                        max=1000,
                        tooltip=(
                            "Number of scope-list words to draw before and after the edit, with "
                            "eight sampling steps each, starting with those that change most. 0: "
                            "none."
                        ),
                    )
                ),
                advanced(
                    io.Float.Input(
                        "away",  # the name of 0.2, kept for saved graphs
                        optional=True,
                        display_name="concept suppression",
                        default=DEFAULTS.suppression,
                        min=0.0,
                        max=MAX_SUPPRESSION,
                        step=0.1,
                        tooltip=(
                            "Strength with which the directions of the concept and of its "
                            "neighbours are suppressed in everyday prompts. 0: everyday prompts "
                            "are left unchanged, and words that seem unrelated to the concept may "
                            "still draw it."
                        ),
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Edited model."),
                ErasureWire.Output(
                    display_name="erasure", tooltip="Erasure to align, apply, merge or save."
                ),
                io.Image.Output(
                    display_name="scope",
                    tooltip="Chart of the words that change with the concept, wanted and unwanted.",
                ),
                io.String.Output(display_name="scope_text", tooltip="Scope list as text."),
            ],
            view=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        mining,
        lambda1: float = DEFAULTS.lambda1,
        lambda2: float = DEFAULTS.lambda2,
        bank: bool = DEFAULTS.bank,
        check: int = 0,
        away: float = DEFAULTS.suppression,
    ) -> io.NodeOutput:
        refuse_other_family(mining.text.family, family_in(model.model.diffusion_model))
        settings = SolveSettings(lambda1, lambda2, away, bank=bank)
        source = {"comfyui": comfyui_version.__version__}
        report = reporter(cls.hidden.unique_id, "encoding the preservation bank")
        erasure = erase(mining, settings, source, report)
        edited = apply_erasure(model, erasure)
        effects = scope_report(erasure, mining.text, mining.plan)
        if check:
            report = reporter(cls.hidden.unique_id, "drawing words")
            before, after = (
                partial(coarse_samples, ComfyDiffusion(drawing, mining.text), progress=report)
                for drawing in (model, edited)
            )
            effects = scope.check_images(effects, mining.plan.concepts, check, before, after)
        erased = sum(effect.share_to_anchor >= scope.ERASED for effect in effects)
        sentence = f"{erased} words move at least half of the way to the anchor"
        drawn = [effect for effect in effects if effect.image_moved is not None]
        if drawn:
            changed = sum(effect.erased for effect in drawn)
            sentence += f"; {changed} of the {len(drawn)} words drawn (✓) change strongly"
        picture = to_image(plots.scope_picture(effects))
        scope_text = "\n".join(
            f"{effect.word}: {100 * effect.share_to_anchor:.0f} % of the way to "
            f"{effect.concept}'s anchor, {100 * effect.moved:.0f} % moved"
            + (
                ""
                if effect.image_moved is None
                else f", {100 * effect.image_moved:.0f} % when drawn"
            )
            for effect in effects
        )
        anchors = {concept.name: concept.anchor for concept in mining.plan.concepts}
        view = {
            "realera_scope": [
                [
                    effect.word,
                    effect.concept,
                    round(effect.share_to_anchor, 3),
                    round(effect.moved, 3),
                    None if effect.image_moved is None else round(effect.image_moved, 3),
                    effect.erased,
                    anchors[effect.concept],
                ]
                for effect in effects
            ],
            "text": [sentence],
        }
        return io.NodeOutput(edited, erasure, picture, scope_text, ui=view)


class ApplyErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraApplyErasure",
            display_name="Apply Erasure",
            description=(
                "Applies an erasure to a MODEL, as LoraLoader applies a LoRA; the input MODEL is "
                "not changed. LoRAs that are loaded before this node are edited as well; LoRAs "
                "that are loaded after it are not."
            ),
            search_aliases=[*ALIASES, "apply concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="Model to erase the concepts from."),
                ErasureWire.Input("erasure", tooltip="Erasure to apply."),
                strength_input(
                    "edit_strength",
                    "Strength of the closed-form edit. 0: none, 1: full.",
                ),
                strength_input(
                    "lora_strength",
                    "Strength of the aligned LoRA, where the erasure has one. 0: none, 1: full.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Edited model.")],
        )

    @classmethod
    def execute(
        cls, model, erasure, edit_strength: float = 1.0, lora_strength: float = 1.0
    ) -> io.NodeOutput:
        return io.NodeOutput(apply_erasure(model, erasure, edit_strength, lora_strength))


class MergeErasures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RealEraMergeErasures",
            display_name="Merge Erasures",
            description=(
                "Merges erasures into one that erases all of their concepts, solved jointly rather "
                "than one after another."
            ),
            search_aliases=["combine erasures", "several concepts", "join erasures"],
            inputs=[
                ErasureWire.Input("first", tooltip="First erasure."),
                ErasureWire.Input(
                    "second", tooltip="Second erasure, for the same family of models."
                ),
                ErasureWire.Input(
                    "third", optional=True, tooltip="Third erasure, for the same family of models."
                ),
                ErasureWire.Input(
                    "fourth",
                    optional=True,
                    tooltip="Fourth erasure, for the same family of models.",
                ),
                *growing(
                    ErasureWire.Input("erasure", optional=True),
                    MORE,
                    "Further erasures, as many as needed.",
                ),
            ],
            outputs=[ErasureWire.Output(display_name="erasure", tooltip="Merged erasure.")],
        )

    @classmethod
    def execute(cls, first, second, third=None, fourth=None, more=None) -> io.NodeOutput:
        erasures = [first, second, third, fourth, *(more or {}).values()]
        return io.NodeOutput(Erasure.merge([e for e in erasures if e is not None]))
