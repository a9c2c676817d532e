"""Closed-Form Edit (Eq. 7; Alg. 1, l. 24), Apply Erasure (l. 31) and Merge Erasures."""

from functools import partial

import comfyui_version
from comfy_api.latest import io

from ..realera.algorithm import erase, scope_report
from ..realera.edit.erasure import Erasure as ErasureOf
from ..realera.edit.text_layers import family_in
from ..realera.evaluation.coarse_samples import coarse_samples
from ..realera.report import plots
from ..realera.report.scope import ERASED, check_images
from ..realera.settings import MAX_SUPPRESSION, SolveSettings
from .comfy_model import ComfyDiffusion, refuse_other_family
from .comfy_patch import apply_erasure
from .page import to_image
from .progress import reporter
from .schema import Erasure, MiningWire, advanced, growing, schema, strength_input

DEFAULTS = SolveSettings()
MORE = ["fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]


class ClosedFormEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RealEraClosedFormEdit",
            display_name="Closed-Form Edit",
            description=(
                "Solves for the one small matrix that maps the concept to the anchor, takes its "
                "neighbours along and keeps everything else (RealEra, Eq. 7). Takes seconds; the "
                "model can be used at once."
            ),
            search_aliases=["erase concept", "concept erasure", "UCE", "closed form", "unlearn"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is to forget; it stays as it is."),
                MiningWire.Input(
                    "mining",
                    tooltip="From Neighbor Sampler, or from Beyond Sampler after it.",
                ),
                advanced(
                    io.Float.Input(
                        "lambda1",
                        optional=True,
                        display_name="λ1",
                        default=DEFAULTS.lambda1,
                        min=0.0,
                        max=100.0,
                        step=0.01,
                        tooltip="Weight of what is preserved. Larger keeps more, erases less.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "lambda2",
                        optional=True,
                        display_name="λ2",
                        default=DEFAULTS.lambda2,
                        min=1e-6,
                        max=1.0,
                        step=1e-6,
                        tooltip="Weight of staying near the original; keeps Eq. 7 solvable.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "bank",
                        optional=True,
                        display_name="preservation bank",
                        default=DEFAULTS.bank,
                        tooltip=(
                            "Preserve what a thousand everyday prompts mean as well. Without it, "
                            "mining costs much of what is not to be erased."
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
                            "So many words of the list are drawn before and after, in eight "
                            "steps, and those that change most come first. 0: none is drawn."
                        ),
                    )
                ),
                advanced(
                    io.Float.Input(
                        "away",
                        optional=True,
                        display_name="suppression",
                        default=DEFAULTS.suppression,
                        min=0.0,
                        max=MAX_SUPPRESSION,
                        step=0.1,
                        tooltip=(
                            "How strongly everyday prompts are pushed off the direction of the "
                            "concept and of the words around it. 0: not at all, and words without "
                            "a visible relation to the concept may go on drawing it. Needs the "
                            "preservation bank."
                        ),
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The edited model."),
                Erasure.Output(display_name="erasure", tooltip="To align, apply, merge or save."),
                io.Image.Output(
                    display_name="scope",
                    tooltip="Which words went with the concept: wanted ones and collateral.",
                ),
                io.String.Output(display_name="scope_text", tooltip="The same as text."),
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
        report = reporter(cls.hidden.unique_id, "reading everyday prompts")
        erasure = erase(mining, settings, source, report)
        edited = apply_erasure(model, erasure)
        effects = scope_report(erasure, mining.text, mining.plan)
        if check:
            report = reporter(cls.hidden.unique_id, "drawing words")
            before, after = (
                partial(coarse_samples, ComfyDiffusion(of, mining.text), progress=report)
                for of in (model, edited)
            )
            effects = check_images(effects, mining.plan.concepts, check, before, after)
        erased = sum(effect.share_to_anchor >= ERASED for effect in effects)
        told = f"{erased} words go more than half the way to the anchor"
        drawn = [effect for effect in effects if effect.image_moved is not None]
        if drawn:
            changed = sum(effect.erased for effect in drawn)
            told += f"; of {len(drawn)} that were drawn (✓), {changed} change much"
        picture = to_image(plots.scope_picture(effects))
        listed = "\n".join(
            f"{e.word}: {100 * e.share_to_anchor:.0f} % toward {e.concept}'s anchor, "
            f"{100 * e.moved:.0f} % moved"
            + ("" if e.image_moved is None else f", {100 * e.image_moved:.0f} % when drawn")
            for e in effects
        )
        shown = {
            "realera_scope": [
                [
                    e.word,
                    e.concept,
                    round(e.share_to_anchor, 3),
                    round(e.moved, 3),
                    None if e.image_moved is None else round(e.image_moved, 3),
                    e.erased,
                ]
                for e in effects
            ],
            "text": [told],
        }
        return io.NodeOutput(edited, erasure, picture, listed, ui=shown)


class ApplyErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RealEraApplyErasure",
            display_name="Apply Erasure",
            description=(
                "Puts an erasure on a MODEL, as LoraLoader puts a LoRA on it: the MODEL that you "
                "give stays as it is. LoRAs before this node are edited with the model, LoRAs "
                "after it act on top."
            ),
            search_aliases=["erase", "forget", "apply concept erasure", "unlearn"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is to forget."),
                Erasure.Input("erasure", tooltip="What it is to forget."),
                strength_input(
                    "edit_strength",
                    "How much of the closed-form edit is applied. 0: none, 1: all of it.",
                ),
                strength_input(
                    "lora_strength",
                    "How much of the aligned LoRA is applied, where the erasure has one.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model that has forgotten.")
            ],
        )

    @classmethod
    def execute(
        cls, model, erasure, edit_strength: float = 1.0, lora_strength: float = 1.0
    ) -> io.NodeOutput:
        return io.NodeOutput(apply_erasure(model, erasure, edit_strength, lora_strength))


class MergeErasures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RealEraMergeErasures",
            display_name="Merge Erasures",
            description=(
                "One erasure that forgets what all of them forget, solved jointly and not one "
                "after the other."
            ),
            search_aliases=["combine erasures", "several concepts", "join erasures"],
            inputs=[
                Erasure.Input("first", tooltip="An erasure for a model of some family."),
                Erasure.Input("second", tooltip="Another one for the same family."),
                Erasure.Input("third", optional=True, tooltip="One more, if there is one."),
                Erasure.Input("fourth", optional=True, tooltip="One more, if there is one."),
                *growing(
                    Erasure.Input("erasure", optional=True), MORE, "More, as many as you like."
                ),
            ],
            outputs=[Erasure.Output(display_name="erasure", tooltip="Forgets all of them.")],
        )

    @classmethod
    def execute(cls, first, second, third=None, fourth=None, more=None) -> io.NodeOutput:
        given = [first, second, third, fourth, *(more or {}).values()]
        return io.NodeOutput(ErasureOf.merge([one for one in given if one is not None]))
