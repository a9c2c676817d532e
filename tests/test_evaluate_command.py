"""`realera demo` and `realera evaluate`: the files that they write, and their output."""

import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from realera.cli import main
from realera.evaluation.scorers import Recognised, miniature_classifier
from realera.pipelines.sampling import Sampling

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs/recipes.md"
EVALUATION = {"evaluation.json", "evaluation.txt", "evaluation.png"}


def stored(folder):
    return json.loads((folder / "evaluation.json").read_text("utf-8"))


def files(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`realera demo`, the README's first command, with little to draw."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--images", "1", "--steps", "2", "--batch", "1", "-o", str(out)]) == 0
    return out


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of the airplane\n\na dog on a chair\n", "utf-8")
    return str(path)


def test_the_demo_writes_the_files_in_the_readme_and_erases(demo):
    pictures = {"neighbourhood.png", "scope.png", "loss.png", "before-after.png"}
    parts = {
        "checkpoint.safetensors",
        "lora.safetensors",
        "erasure.safetensors",
        "scope.txt",
        "words.txt",
        "README.md",
    }
    assert files(demo) == EVALUATION | pictures | parts
    for name in (*pictures, "evaluation.png"):
        assert Image.open(demo / name).width > 300
    scores = (demo / "evaluation.txt").read_text("utf-8")
    assert f"```text\n{scores}```" in (demo / "README.md").read_text("utf-8")
    before, after = stored(demo)["original"], stored(demo)["erased"]
    assert before["scorer"] == "miniature concept" and before["settings"]["images"] == 1
    assert before["metrics"]["acc_e"] > 75 and after["metrics"]["acc_e"] < 25
    assert before["metrics"]["h_o"] < 25 and after["metrics"]["h_o"] > 75


def test_a_style_is_scored_by_the_style_classifier(tmp_path, capsys):
    assert main(["evaluate", "miniature", "comic", "--images", "1", "-o", str(tmp_path)]) == 0
    assert files(tmp_path) == EVALUATION
    report = stored(tmp_path)["original"]
    assert report["concept"] == "comic" and report["scorer"] == "miniature style"
    assert report["metrics"]["acc_e"] > 75 and report["metrics"]["acc_s"] > 75
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "evaluation.txt").read_text("utf-8")
    assert "held-out words" in printed


def test_explicit_content_is_counted_before_and_after_and_no_picture_is_kept(
    demo, prompts, tmp_path
):
    out, erasure = tmp_path / "out", str(demo / "erasure.safetensors")
    assert (
        main(["evaluate", "miniature", prompts, erasure, "--scorer", "nudity", "-o", str(out)]) == 0
    )
    assert files(out) == EVALUATION - {"evaluation.png"}
    assert stored(out).keys() == {"original", erasure}
    for survey in stored(out).values():
        assert survey["scorer"].startswith("NudeNet")
        assert all(score == {"total": 0, "images": 2} for score in survey["scores"].values())
    head = (out / "evaluation.txt").read_text("utf-8").splitlines()[0]
    assert "Breasts (F)" in head and head.endswith("total ↓  found % ↓")


def test_a_benchmark_file_of_prompts_counts_a_class_before_and_after(demo, tmp_path):
    """With the seeds of the file: two lines that are the same draw the same image."""
    path, erasure = tmp_path / "prompts.csv", str(demo / "erasure.safetensors")
    line = "a photo of the airplane,5,3.0\n"
    path.write_text(f"prompt,evaluation_seed,evaluation_guidance\n{line}{line}", "utf-8")
    label, out = ["--label", "airplane"], tmp_path / "out"
    assert main(["evaluate", "miniature", str(path), erasure, *label, "-o", str(out)]) == 0
    before, after = stored(out).values()
    assert before["scorer"] == "airplane by miniature concept"
    assert before["scores"]["airplane"]["total"] == 2 and before["found"]["total"] == 200
    assert after["scores"]["airplane"]["total"] == 0


def test_captions_have_a_clip_score(demo, prompts, clip_folder, tmp_path):
    out, erasure = tmp_path / "out", str(demo / "erasure.safetensors")
    scorer = ["--scorer", "clip-score", "--clip", str(clip_folder)]
    assert main(["evaluate", "miniature", prompts, erasure, *scorer, "-o", str(out)]) == 0
    assert files(out) == EVALUATION
    scores = [survey["scores"]["CLIP score"] for survey in stored(out).values()]
    assert all(score["images"] == 2 and 0 <= score["total"] <= 200 for score in scores)
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("concept", "scorer", "name"),
    [
        ("Van Gogh", [], "CLIP score, CLIP"),
        ("Van Gogh", ["--scorer", "clip"], "CLIP"),
        ("dog", [], "CLIP"),
    ],
)
def test_the_papers_concepts_are_scored_as_in_the_paper(
    concept, scorer, name, singles, clip_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "realera.cli.evaluation_files.Sampling", lambda **how: Sampling(steps=1, **how)
    )
    rest = ["--clip", str(clip_folder), "--images", "1", "-o", str(tmp_path)]
    assert main(["evaluate", str(singles["sd1"]), concept, *scorer, *rest]) == 0
    report = stored(tmp_path)["original"]
    assert report["scorer"].startswith(name) and report["concept"] == concept
    if name == "CLIP":
        assert "score" not in report["scorer"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["toaster"], "draws no 'toaster'"),
        (["toaster"], "there is no file of prompts"),
        (["toaster.safetensors"], "name the concept, then the erasures"),
        (["dog", "--scorer", "nudity"], "give a file of prompts"),
        (["PROMPTS"], "add --scorer nudity or --scorer clip-score"),
        (["PROMPTS", "--scorer", "bundled"], "or the class to count (--label)"),
        (["PROMPTS", "--scorer", "clip", "--label", "dog"], "give such a file, and a classifier"),
        (["PROMPTS", "--label", "toaster"], "cannot recognise 'toaster'"),
        (["dog", "--label", "dog"], "counts a class in images of a file of prompts"),
        (["dog", "--scorer", "nudenet"], "there is no scorer 'nudenet': choose bundled, clip"),
        (["PROMPTS", "--scorer", "clip"], "add --scorer nudity or --scorer clip-score"),
        (["PROMPTS", "--scorer", "nudity", "--clip", "x"], "leave out --clip"),
        (["dog", "--clip", "x"], "leave out --clip"),
    ],
)
def test_a_senseless_combination_of_options_is_refused_with_what_would_work(
    arguments, reason, prompts, tmp_path, capsys
):
    arguments = [prompts if part == "PROMPTS" else part for part in arguments]
    out = tmp_path / "out"
    assert main(["evaluate", "miniature", *arguments, "-o", str(out)]) == 1
    assert reason in capsys.readouterr().err and not out.exists()


def test_the_bundled_classifier_scores_the_bundled_model_only(singles, tmp_path, capsys):
    arguments = ["evaluate", str(singles["sd1"]), "dog", "--scorer", "bundled"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 1
    assert "choose --scorer clip or" in capsys.readouterr().err
    assert main(["evaluate", str(singles["sd1"]), "comic"]) == 1
    assert "the paper does not evaluate 'comic'" in capsys.readouterr().err


def test_an_evaluation_is_not_overwritten(tmp_path, prompts, capsys):
    (tmp_path / "evaluation.json").write_text("{}")
    arguments = ["evaluate", "miniature", prompts, "--scorer", "nudity", "-o", str(tmp_path)]
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "evaluation.json").read_text() == "{}"


# ------------------------------------------------------------------ the technique of eval-unlearn


def images_of(pictures):
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def technique_of(demo, **config):
    """Made as eval-unlearn does it: the entry point of pyproject.toml, the config of a recipe."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    [entry] = re.findall(r'techniques"\]\nrealera = "(.+)"', project)
    named = pkgutil.resolve_name(entry)
    [recipe] = re.findall(r"```json\n(.+?)```", RECIPES.read_text("utf-8"), re.DOTALL)
    given = json.loads(recipe)["technique"]["config"]
    given |= {"model": "miniature", "erasure": str(demo / "erasure.safetensors"), "device": "cpu"}
    return named(**{**given, "erase_concept": "Airplane", "num_inference_steps": 8, **config})


def test_the_technique_draws_with_the_erasure_from_the_given_seeds(demo):
    technique, classify = technique_of(demo), miniature_classifier()
    prompts = ["a photo of the airplane", "a photo of the dog"]
    first = technique.generate(prompts=prompts, seed=None)
    assert classify(images_of(first), ["tree", "dog"])[:, 0].tolist() == [100, 100]
    again = technique.generate(prompts[1:], seed=1)
    level = {"atol": 2 / 255, "rtol": 0}  # a batch of another size rounds otherwise
    torch.testing.assert_close(images_of(again), images_of(first[1:]), **level)
    other = technique.generate(prompts[1:])  # seed 3: images go on after the three before
    assert not torch.allclose(images_of(again), images_of(other), **level)
    assert technique.drawn == 4


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        ({"erase_concept": "ship"}, ValueError, "does not erase 'ship'.*one of its concepts, air"),
        ({"erasure": "none"}, OSError, "none"),
        ({"model": "miniature-dit"}, ValueError, "made for|does not fit"),
        ({"num_inference_steps": 0}, ValueError, "steps"),
        ({"use_fp16": True}, TypeError, "use_fp16"),
    ],
)
def test_a_technique_that_would_be_reported_wrongly_is_refused(config, error, reason, demo):
    with pytest.raises(error, match=reason):
        technique_of(demo, **config)


@pytest.mark.filterwarnings("default")
def test_eval_unlearn_finds_the_technique_and_scores_it(demo, tmp_path, monkeypatch):
    extra = "eval-unlearn is an optional extra: pip install 'realera[eval-unlearn]'"
    runners = pytest.importorskip("eval_unlearn.runners", reason=extra)
    from eval_unlearn.registry import register_metric
    from eval_unlearn.types import Dataset, MetricResult

    @register_metric("planes")
    class Planes:
        def load_dataset(self):
            return [Dataset(["a photo of the airplane"] * 2, {"source": "here"}) for _ in range(2)]

        def update(self, images, prompts, metadata):
            scorer = Recognised(miniature_classifier(), "airplane")
            self.found = getattr(self, "found", []) + scorer(images_of(images), prompts).tolist()

        def compute(self):
            return MetricResult("planes", sum(map(sum, self.found)), {"images": len(self.found)})

    config = {"model": "miniature", "erasure": str(demo / "erasure.safetensors"), "device": "cpu"}
    config |= {"erase_concept": "airplane", "num_inference_steps": 8}
    run = runners.MultiBenchmarkRunner("realera", ["planes"], config, output_dir=str(tmp_path))
    report = run.run()
    assert report["erase_concept"] == "airplane"
    assert report["metric_results"]["planes"]["value"] == 0
    assert report["metric_results"]["planes"]["details"] == {"images": 4}
    assert len(list(tmp_path.rglob("*.png"))) == 4
