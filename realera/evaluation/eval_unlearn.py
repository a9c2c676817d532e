"""The technique `realera` of eval-unlearn, a runner of published benchmarks of erasure.

https://pypi.org/project/eval-unlearn (REAL-Lab-Imperial), by its entry-point group
`eval_unlearn.techniques`.
"""

from collections.abc import Sequence

from PIL import Image

from ..checkpoints.loading import load_model
from ..edit.erasure import concepts_of, erase_in_place
from ..edit.erasure_file import load_erasure
from ..pipelines.sampling import Sampling
from ..report.plots import to_pil
from .evaluate import sample_images


class EvalUnlearnTechnique:
    """A model with an erasure, as a technique of eval-unlearn; the parameters are its `config`.

    model: checkpoint file, diffusers folder or name of a bundled model
    erasure: erasure file for that model
    erase_concept: concept that eval-unlearn reports, one of the erasure's
    device: device to draw on
    num_inference_steps: number of steps per image
    guidance_scale: classifier-free guidance scale; None: the default of the family

    Raises OSError and ValueError as `load_model` and `load_erasure`, and ValueError when the
    erasure does not erase `erase_concept` or does not fit the model.
    """

    def __init__(
        self,
        *,
        model: str,
        erasure: str,
        erase_concept: str,
        device: str = "cuda",
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
    ) -> None:
        loaded = load_erasure(erasure)
        erased = [concept.name for concept in concepts_of(loaded)]
        if erase_concept.casefold() not in map(str.casefold, erased):
            raise ValueError(
                f"{erasure} does not erase {erase_concept!r}: set erase_concept to one of its "
                f"concepts, {', '.join(erased)}, or make an erasure of {erase_concept!r}"
            )
        self.sampling = Sampling(num_inference_steps, guidance_scale)
        self.model = load_model(model, device=device)
        erase_in_place(loaded, self.model.network)
        self.drawn = 0

    def generate(self, prompts: Sequence[str], seed: int | None = None) -> list[Image.Image]:
        """One image per prompt, in their order.

        prompts: prompts to draw
        seed: seed of the first image, one more for each further image; None: the number of images
            that were drawn before
        """
        first = self.drawn if seed is None else seed
        self.drawn += len(prompts)
        seeds = range(first, first + len(prompts))
        batches = sample_images(self.model, prompts, 1, self.sampling, seeds=seeds)
        return [to_pil(image) for batch in batches for image in batch]
