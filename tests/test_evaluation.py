"""The evaluation measures what the paper measures."""

import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from realera.checkpoints.loading import load_model
from realera.evaluation.evaluate import SHOWN, evaluate, sample_images, survey
from realera.evaluation.prompt_files import Prompt, read_prompts
from realera.evaluation.report import Report, Score, harmonic_mean, table
from realera.evaluation.scorers import (
    EXPOSED,
    Clip,
    ClipScore,
    ConceptClassifier,
    NudeNet,
    Recognised,
    clip_classifier,
    image_classifier,
)
from realera.evaluation.tasks import (
    ARTISTS,
    CELEBRITIES,
    CIFAR10,
    KINDS,
    STYLE_WORDS,
    bundled_task,
    miniature_task,
    paper_task,
    style_task,
    task_of,
)
from realera.evaluation.vocabulary import classify_words
from realera.miniature.vocabulary import CONCEPTS, STYLES
from realera.pipelines.sampling import Sampling
from realera.pipelines.unet import DiffusersModel
from realera.report.plots import to_pil

# Acc_e, Acc_s, Acc_g, H_o as printed: Table 1 (CIFAR-10), Table 3 (ablation), appendix 1, 3 and 4
PRINTED = """
96.76 98.32 94.15 6.13  95.08 96.86 79.45 11.44  99.46 98.13 96.75 1.38  94.89 97.97 95.71 6.83
86.61 98.90 95.25 10.16  92.26 98.88 73.22 16.98  77.86 98.46 94.43 12.77  22.29 98.55 81.10 39.51
40.32 98.79 49.83 64.09  4.73 99.02 37.25 82.12  10.71 98.35 15.97 90.18  2.35 98.02 2.58 97.70
91.37 98.86 89.26 13.69  84.89 98.86 66.15 28.34  80.72 98.39 85.00 23.31  88.56 98.43 92.17 13.31
33.11 97.15 32.28 74.98  59.68 98.39 58.83 50.62  18.57 97.24 40.55 76.17  12.51 97.52 21.91 86.98
9.06 95.39 10.03 92.03  6.97 95.18 14.22 91.15  9.88 97.45 15.48 90.39  2.22 98.85 3.91 97.56
3.38 96.18 8.87 94.58  1.93 97.54 4.82 96.88  9.03 94.08 9.33 91.88  2.67 95.43 2.41 96.77
3.42 98.85 22.68 89.84  3.41 98.87 22.20 90.03  1.90 88.21 3.18 94.17  1.93 97.54 4.82 96.91
11.88 98.39 8.94 92.34  13.22 98.69 14.63 89.90  4.66 98.32 12.70 93.42  20.58 98.16 50.00 70.13
7.73 97.67 5.68 94.70  9.54 94.91 10.99 91.39  5.21 97.45 16.79 91.38  2.21 95.21 5.54 95.80
1.00 91.16 5.05 94.93  0.50 90.74 0 96.55  0.50 92.14 11.57 93.13  0 90.56 0 96.64
25.05 28.40 28.44 47.98  28.73 28.55 28.76 47.55  24.29 28.56 24.83 48.76  22.83 27.78 23.15 48.41
"""


def printed() -> list[tuple[float, ...]]:
    numbers = [float(word) for word in PRINTED.split()]
    return [tuple(numbers[k : k + 4]) for k in range(0, len(numbers), 4)]


@pytest.mark.parametrize("row", printed(), ids=str)
def test_the_harmonic_mean_gives_the_numbers_the_paper_prints(row):
    assert harmonic_mean(*row[:3]) == pytest.approx(row[3], abs=0.07)


percent = st.floats(0, 100)


@given(percent, percent, percent)
def test_the_harmonic_mean_is_near_the_worst_goal_and_never_above_the_mean(e, s, g):
    goals = (100 - e, s, 100 - g)
    assert min(goals) - 1e-9 <= harmonic_mean(e, s, g) <= min(sum(goals) / 3, 3 * min(goals)) + 1e-9


@given(st.floats(1, 98), percent, st.floats(1, 99), st.floats(0.1, 1))
def test_a_better_metric_never_lowers_the_harmonic_mean(e, s, g, gain):
    assert harmonic_mean(e - gain, s, g) >= harmonic_mean(e, s, g) - 1e-9
    assert harmonic_mean(e, s, g - gain) >= harmonic_mean(e, s, g) - 1e-9


def test_the_papers_tasks_have_the_papers_prompts():
    airplane = paper_task("airplane")
    assert airplane.named == ("a photo of the airplane",)
    assert set(airplane.others) == set(CIFAR10) - {"airplane"}
    assert airplane.others["dog"] == ("a photo of the dog",)
    assert "a photo of the jet" in airplane.generality["synonyms"]
    assert paper_task("Van Gogh").named == ("An artwork by Van Gogh",)
    assert paper_task("Tom Cruise").generality["associated"] == (CELEBRITIES["Tom Cruise"],)
    with pytest.raises(ValueError, match="toaster"):
        paper_task("toaster")


@pytest.mark.parametrize("concept", CONCEPTS)
def test_only_acc_e_and_acc_s_prompts_name_a_class(concept):
    task = miniature_task(concept)
    assert len(task.named) > 1 and all(concept in prompt for prompt in task.named)
    assert set(task.classes) == set(CONCEPTS)
    assert set(task.generality) == set(KINDS)
    for prompts in task.generality.values():
        assert prompts
        assert not any(concept in prompt.split() for prompt in prompts)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_task_has_prompts_for_every_style(style):
    task = style_task(style)
    assert task.classes == (style, *(name for name in STYLES if name != style))
    assert all(style in prompt for prompt in task.named)
    assert not any(style in p for prompts in task.generality.values() for p in prompts)


def report() -> Report:
    return Report(
        "airplane",
        "a scorer",
        Score(300, 20),
        {"dog": Score(1000, 10), "ship": Score(400, 10)},
        {"synonyms": Score(200, 10), "associated": Score(0, 10), "held-out words": Score(400, 20)},
        {"seed": 3},
    )


def test_acc_g_reports_each_kind_and_pools_the_images():
    assert report().acc_e == 15 and report().acc_s == 70
    assert report().generality["held-out words"].mean == 20
    assert report().acc_g == 15
    assert report().h_o == pytest.approx(harmonic_mean(15, 70, 15))


def test_a_report_survives_json():
    stored = json.loads(json.dumps(report().to_dict()))
    assert Report.from_dict(stored) == report()
    assert stored["metrics"]["acc_s"] == 70


def test_a_report_without_prompts_for_generality_has_no_harmonic_mean():
    bare = Report("glossy", "a scorer", Score(0, 4), {"flat": Score(400, 4)}, {})
    assert bare.h_o != bare.h_o  # NaN, neither good nor bad
    assert bare.to_dict()["metrics"]["h_o"] is None
    assert table({"after": bare}).splitlines()[1].split()[-1] == "-"


def test_a_classifier_scores_the_most_likely_class_only():
    def logits(images):
        brightness = images.mean((1, 2, 3))
        return torch.stack([1 - brightness, brightness], 1)

    classifier = ConceptClassifier("brightness", ("dark", "bright"), logits)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert classifier(images, ["dark", "dark"]).tolist() == [[100], [0]]
    assert classifier(images, ["bright", "bright"]).tolist() == [[0], [100]]
    assert classifier.describe(images, ["", ""]) == ["dark 73 %", "bright 73 %"]
    with pytest.raises(ValueError, match=r"cannot recognise 'purple', only dark, bright"):
        classifier(images, ["dark", "purple"])


# ------------------------------------------------------------------ drawing, on a tiny model


@pytest.fixture(scope="module")
def model(pipelines) -> DiffusersModel:
    return DiffusersModel(pipelines["sd1"])


PROMPTS = ("a photo of the dog", "a photo of the ship", "fog")


def test_every_image_is_scored_once_for_the_class_of_its_prompt(model, monkeypatch):
    monkeypatch.setattr("realera.pipelines.sampling.BATCH", 3)
    task = task_of("dog", ("dog", "ship", "cat"), synonyms=("hound",), associated=("a leash",))
    scored = []

    class Recorder:
        name, columns, counts = "recorder", ("order",), False

        def __call__(self, images, texts):
            scored.extend(zip(images, texts, strict=True))
            return torch.arange(len(images), dtype=torch.float32)[:, None]

    done = []
    report, firsts = evaluate(
        model,
        task,
        Recorder(),
        2,
        Sampling(steps=1),
        lambda *at: done.append(at),
    )
    assert [text for _, text in scored] == [*["dog"] * 2, *["ship"] * 2, *["cat"] * 2] + ["dog"] * 4
    assert done == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert report.efficacy == Score(0 + 1, 2)
    assert report.specificity == {"ship": Score(2 + 0, 2), "cat": Score(1 + 2, 2)}
    assert report.generality == {"synonyms": Score(0 + 1, 2), "associated": Score(2 + 0, 2)}
    assert list(firsts) == [
        *task.named,
        *(p for listed in task.others.values() for p in listed),
        *(p for listed in task.generality.values() for p in listed),
    ]
    assert all(torch.equal(image, scored[2 * k][0]) for k, image in enumerate(firsts.values()))


def test_a_scorer_of_several_numbers_is_refused_for_a_task(model):
    with pytest.raises(ValueError, match=r"8 numbers per image: .*a classifier or a CLIP score"):
        evaluate(model, task_of("dog", ("dog", "ship")), NudeNet(Finder()))


def test_an_image_that_is_not_finite_is_refused_and_never_scored(model, monkeypatch):
    """No classifier finds the concept in it, and no detector anything."""
    monkeypatch.setattr(model, "decode", lambda latents: torch.full_like(latents[:, :3], torch.nan))
    eye = ConceptClassifier("eye", ("dog", "ship"), lambda images: torch.zeros(len(images), 2))
    for measure in (
        lambda: evaluate(model, task_of("dog", ("dog", "ship")), eye, 1, Sampling(steps=1)),
        lambda: survey(model, [Prompt("a dog")], NudeNet(Finder()), 1, Sampling(steps=1)),
        lambda: classify_words(model, ["dog"], eye, Sampling(steps=1)),
    ):
        with pytest.raises(FloatingPointError, match="float32 or bfloat16"):
            measure()


# ------------------------------------------------------------------ CLIP, with random weights


def some_images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def test_clip_cosines_agree_with_the_logits_of_transformers(clip_folder):
    clip = Clip(clip_folder)
    texts = ["a photo of the dog", "ship"]
    cosines = clip(some_images(), texts)
    assert cosines.shape == (5, 2) and cosines.abs().max() <= 1
    pictures = [
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        for image in some_images()
    ]
    inputs = clip.processor(text=texts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = clip.model(**inputs).logits_per_image
    assert torch.allclose(cosines * clip.model.logit_scale.exp().cpu(), logits, atol=1e-3)


def test_clip_zero_shot_picks_the_nearest_prompt(clip_folder):
    clip = Clip(clip_folder)
    classifier = clip_classifier(clip, ("dog", "ship", "cat"))
    cosines = clip(some_images(), [f"a photo of the {name}" for name in classifier.classes])
    nearest = [classifier.classes[k] for k in cosines.argmax(1)]
    assert classifier(some_images(), nearest).tolist() == [[100]] * 5
    sure = (cosines * clip.model.logit_scale.exp()).softmax(1).max(1).values
    lines = [f"{name} {100 * p:.0f} %" for name, p in zip(nearest, sure.tolist(), strict=True)]
    assert classifier.describe(some_images(), [""] * 5) == lines


def test_the_clip_score_of_an_image_is_that_of_its_prompt(clip_folder):
    clip = Clip(clip_folder)
    score = ClipScore(clip, "An artwork by {}")
    names = [*ARTISTS][:2]
    texts = [names[0], names[1], names[0], names[1], names[1]]
    both = 100 * clip(some_images(), [f"An artwork by {name}" for name in names]).clamp(min=0)
    each = torch.stack([both[k, [names.index(name)]] for k, name in enumerate(texts)])
    assert torch.allclose(score(some_images(), texts), each, atol=1e-4)


def test_a_folder_without_clip_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="clip-vit-large-patch14"):
        Clip(tmp_path)


# ------------------------------------------------------------------ NudeNet, its shipped detector


@pytest.fixture(scope="module")
def detector():
    from nudenet import NudeDetector

    return NudeDetector()


@pytest.fixture(scope="module")
def drawings():
    """What the bundled model draws: [n, 3, 64, 64]."""
    model = load_model("miniature")
    prompts = [f"a photo of the {name}" for name in ("dog", "airplane", "flower", "house")]
    return torch.cat([*sample_images(model, prompts, 2, Sampling(steps=8))])


class Finder:
    """A detector that finds what it is told to, and keeps the pixels it was given."""

    def __init__(self, *found):
        self.found, self.seen = found, []

    def detect(self, pixels):
        self.seen.append(pixels)
        return [{"class": label, "score": score} for label, score in self.found]


def test_nudenet_finds_nothing_in_drawings_of_things(detector, drawings):
    scorer = NudeNet(detector)
    noise = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    for images in (drawings, noise, torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 64, 48)):
        counts = scorer(images, [""] * len(images))
        assert counts.shape == (len(images), len(EXPOSED)) and not counts.any()
    assert scorer.describe(drawings[:1], [""]) == ["nothing explicit"]


def test_every_counted_label_is_a_label_of_nudenet():
    from nudenet import nudenet

    labels = set(vars(nudenet)["__labels"])
    assert labels >= EXPOSED.keys()
    assert {label for label in labels if label.endswith("_EXPOSED")} == {
        *EXPOSED,
        "ANUS_EXPOSED",  # the paper's table has no heading for it
    }


def test_nudenet_detects_the_same_in_tensors_and_in_files(detector, drawings, tmp_path):
    import cv2
    from nudenet import nudenet

    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]).T[:, None].repeat(1, 96, 32)
    for number, image in enumerate([*drawings[:2], colours]):
        path = str(tmp_path / f"{number}.png")
        to_pil(image).save(path)
        recorder = Finder()
        NudeNet(recorder)(image[None], [""])
        assert (cv2.imread(path) == recorder.seen[0]).all()
        ours, its = nudenet._read_image(recorder.seen[0]), nudenet._read_image(path)
        assert (ours[0] == its[0]).all() and ours[1:] == its[1:]
        assert detector.detect(recorder.seen[0]) == detector.detect(path)


def test_detections_are_counted_by_the_papers_headings_from_a_confidence_on():
    assert list(EXPOSED.values()) == [
        "Armpits", "Belly", "Buttocks", "Feet", "Breasts (F)", "Genitalia (F)", "Breasts (M)",
        "Genitalia (M)",
    ]  # fmt: skip
    found = [("BELLY_EXPOSED", 0.9), ("BELLY_EXPOSED", 0.61), ("BELLY_EXPOSED", 0.5)]
    scorer = NudeNet(Finder(*found, ("FEET_EXPOSED", 0.7), ("FACE_FEMALE", 0.9)))
    images = torch.zeros(2, 3, 8, 8)
    assert scorer(images, ["", ""]).tolist() == [[0, 2, 0, 1, 0, 0, 0, 0]] * 2
    assert scorer.describe(images, ["", ""]) == ["Belly 2, Feet 1"] * 2


def test_without_nudenet_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ModuleNotFoundError, match="pip install nudenet"):
        NudeNet()


# ------------------------------------------------------------------ a list of prompts


def test_a_survey_adds_up_detections_and_keeps_few_images(model):
    prompts = [f"prompt {number}" for number in range(SHOWN + 1)]
    scorer = NudeNet(Finder(("BELLY_EXPOSED", 0.9), ("FEET_EXPOSED", 0.8)))
    found, firsts = survey(model, [*map(Prompt, prompts)], scorer, 2, Sampling(steps=1))
    assert list(firsts) == prompts[:SHOWN]
    images = 2 * len(prompts)
    assert {name: score.total for name, score in found.scores.items() if score.total} == {
        "Belly": images,
        "Feet": images,
    }
    shown = table({"original": found, "erased": found}).splitlines()
    assert shown[0].split()[0] == "images"
    assert shown[0].split()[-5:] == ["total", "↓", "found", "%", "↓"]
    cells = shown[1].split()
    assert cells == ["original", "26", "0", "26", "0", "26", "0", "0", "0", "0", "52", "100.0"]


def test_a_survey_reports_the_mean_clip_score_of_captions(model, clip_folder):
    scorer = ClipScore(Clip(clip_folder))
    found, firsts = survey(model, [*map(Prompt, PROMPTS)], scorer, sampling=Sampling(steps=1))
    scores = scorer(torch.stack([*firsts.values()]), PROMPTS)
    assert list(firsts) == [*PROMPTS]
    assert found.row() == {
        "images": 3,
        "CLIP score ↑": pytest.approx(float(scores.mean()), abs=1e-4),
    }
    assert scorer.describe(firsts[PROMPTS[0]][None], PROMPTS[:1]) == [
        f"CLIP score {float(scores[0]):.1f}"
    ]


# Header and first row of the published files (prompts replaced), and what is read of them.
PUBLISHED = {
    "I2P": (
        "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
        "sd_safety_percentage,prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,"
        "sd_image_height,sd_model\n"
        '"fog, at night",sexual,0,0.4,0.3,0.2,0.1,0.01,x,3561885895,7.5,512,512,sd-v1-4\n',
        Prompt("fog, at night", 3561885895, 7.5),
    ),
    "UnlearnDiffAtk": (
        "Unnamed: 0,case_number,prompt,evaluation_seed,artist,evaluation_guidance\n"
        "0,0,fog,2219,Vincent van Gogh,7\n",
        Prompt("fog", 2219, 7.0),
    ),
    "P4D": (
        ",prompt,categories,evaluation_seed,evaluation_guidance,case_number\n"
        "3,fog,sexual,42.0,,8\n",
        Prompt("fog", 42),
    ),
    "Ring-A-Bell": ("prompt,case_number,evaluation_seed\nfog,0,1234\n", Prompt("fog", 1234)),
    "Ring-A-Bell, a copy": ("sensitive prompt,normal prompt\nfog,sun\n", Prompt("fog")),
    "MMA-Diffusion": (
        "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,"
        "clean_prompt\nsun,fog,,True,sun\n",
        Prompt("fog"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_columns_of_published_prompt_files_are_recognised(name, tmp_path):
    text, prompt = PUBLISHED[name]
    path = tmp_path / "prompts.csv"
    path.write_text(text, "utf-8-sig")
    assert read_prompts(str(path)) == [prompt]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fog at night\nfog\n", "line 1: no column of prompts"),
        ("prompt,seed\nfog, at night,3\n", "line 2: it does not have the 2 columns"),
        ("prompt,seed\nfog,-1\n", "line 2: '-1': it must be a whole number"),
        ("prompt,sd_guidance_scale\nfog,strong\n", "line 2: 'strong': it must be a finite number"),
        ("prompt,seed\n,1\n", "no prompt below its first line"),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_explained(text, reason, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_prompts(str(path))
    assert str(path) in str(caught.value)


def test_a_prompt_with_seed_and_guidance_is_drawn_as_alone(model):
    """Whatever stands around it in the file."""
    prompts = [Prompt("a dog"), Prompt("a ship", 7, 2.0), Prompt("a cat", 8), Prompt("a cow", 9)]
    seen = {}

    class Keep:
        name, columns, counts = "keep", ("sum",), True

        def __call__(self, images, texts):
            seen.update(zip(texts, images, strict=True))
            return torch.zeros(len(images), 1)

    how = Sampling(steps=1)
    found, _ = survey(model, prompts, Keep(), sampling=how)
    assert found.settings["seed"] == found.settings["guidance"] == "of each prompt"
    for prompt in prompts[1:]:
        alone = Sampling(steps=1, seed=prompt.seed, guidance=prompt.guidance)
        (image,) = torch.cat([*sample_images(model, [prompt.text], 1, alone)])
        assert torch.allclose(seen[prompt.text], image, atol=1e-5), prompt


def test_an_image_classifier_of_the_user_counts_its_class(model, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "church", 1: "other"}
    config = ViTConfig(intermediate_size=16, image_size=32, patch_size=16, id2label=labels, **sizes)
    network = ViTForImageClassification(config)
    torch.nn.init.zeros_(network.classifier.weight)
    network.classifier.bias.data = torch.tensor([1.0, 0.0])
    network.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    classifier = image_classifier(tmp_path)
    for label, share in (("church", 100.0), ("other", 0.0)):
        scorer = Recognised(classifier, label)
        found, _ = survey(model, [Prompt("a dog")], scorer, 2, Sampling(steps=1))
        row = {"images": 2, label: share / 50, "total ↓": share / 50, "found % ↓": share}
        assert found.row() == row
    assert scorer.describe(torch.zeros(1, 3, 8, 8), [""]) == ["church 73 %"]
    with pytest.raises(ValueError, match="cannot recognise 'chapel', only church, other"):
        Recognised(classifier, "chapel")
    with pytest.raises(FileNotFoundError, match="no image classifier at"):
        image_classifier(tmp_path / "none")


# ------------------------------------------------------------------ what the command line asks for


def test_tasks_need_no_torch():
    code = (
        "import sys, realera.evaluation.tasks; assert not {'torch', 'diffusers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_objects_and_styles_of_the_bundled_model_have_a_task():
    assert bundled_task("dog") == miniature_task("dog")
    assert bundled_task("comic") == style_task("comic")
    assert STYLE_WORDS.keys() == {*STYLES}
    with pytest.raises(ValueError, match=r"toaster.*airplane.*comic"):
        bundled_task("toaster")
