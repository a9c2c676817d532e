"""The claims of `test_comfyui_inside.py`, run by ComfyUI's interpreter on the nodes.

Every function whose name starts with "claim_" is a test; the interpreter has no pytest. Prints one
line a claim, `CLAIM {"name": …, "failed": traceback or "", "skipped": reason or ""}`; arguments
choose claims by a part of their name. The exit status is 1 if a claim failed.
"""

# ruff: noqa: E402 (ComfyUI reads its arguments while it is imported)

import json
import os
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

ASKED = sys.argv[1:]
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, os.environ["COMFYUI_DIR"])
import utils.install_util  # noqa: F401 (ComfyUI's, before another module takes the name)
from comfyui_families import (
    CPU,
    FAMILIES,
    NETWORKS,
    SD1,
    apply_erasure,
    diffusions,
    fill,
    own_prediction,
    random_encoding,
    random_erasure,
    random_model,
    text_encoders,
    tiny_clip,
    tiny_text,
    transformer_texts,
    weight_of,
)

HOME = Path(tempfile.mkdtemp())
os.environ["REALERA_CACHE"] = str(HOME / "cache")

import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.supported_models
import comfy.text_encoders.t5
import comfy_extras.nodes_model_advanced as advanced
import folder_paths
import RealEra.realera.text.encoding
import torch
from comfy.sd1_clip import SDClipModel
from comfyui_transformers import loaded_by_comfyui, quantised_flux_text
from conformance import check_diffusion, check_text_encoder, check_transformer_text
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from RealEra.nodes import align, bundled, compare, edit, files, mining
from RealEra.nodes.comfy_batches import on_device
from RealEra.nodes.comfy_model import ComfyDiffusion, training
from RealEra.nodes.comfy_patch import ErasurePatch, write_lora
from RealEra.nodes.comfy_text import ComfyText
from RealEra.nodes.comfy_transformer_text import text_of
from RealEra.nodes.comfy_weights import plain_weight
from RealEra.nodes.schema import BUNDLED
from RealEra.realera import algorithm
from RealEra.realera.checkpoints.loading import load_model
from RealEra.realera.checkpoints.writing import write_checkpoint
from RealEra.realera.cli.output_folder import check_effects
from RealEra.realera.concepts import parse_concepts
from RealEra.realera.edit.closed_form import Edit
from RealEra.realera.edit.erasure_file import load_erasure, save_erasure
from RealEra.realera.edit.text_layers import FAMILIES as TEXT_FAMILIES
from RealEra.realera.edit.text_layers import text_layers
from RealEra.realera.evaluation.coarse_samples import coarse_samples
from RealEra.realera.miniature import T5, TRANSFORMER
from RealEra.realera.mining import definitions, preservation_bank
from RealEra.realera.mining.vocabulary import vocabulary_rows
from RealEra.realera.settings import Settings
from RealEra.realera.text.encoding import CONTEXT, POOLED, Encoding
from RealEra.realera.text.token_alignment import map_rows, unit
from RealEra.realera.training import adversarial, gradient_checkpointing
from safetensors import safe_open
from safetensors.torch import load_file
from server import PromptServer
from transformers import T5Config, T5EncoderModel

PromptServer.instance = SimpleNamespace(
    send_sync=lambda *_: None,
    send_progress_text=lambda *_: None,
    client_id=None,
    last_prompt_id=None,
    last_node_id=None,
)
folder_paths.set_output_directory(str(HOME / "output"))
NAMED = "airplane -> tree"
BANK = preservation_bank.bank_prompts()[:96]  # the whole bank is encoded in ten seconds
preservation_bank.bank_prompts = lambda: BANK


class Skipped(Exception):
    """A claim that this release of ComfyUI has no part in."""


def run(node, **inputs):
    """What a node returns for these inputs and its defaults."""
    prepared = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=None)})
    return prepared.execute(**inputs).args


@contextmanager
def refused(words):
    """The block must raise a ValueError that says this."""
    try:
        yield
    except ValueError as error:
        assert words in str(error), f"{words!r} is not in {error}"
    else:
        raise AssertionError(f"accepted; {words!r} was to be said")


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@cache
def miniature():
    model, clip, vae, *_ = run(bundled.BundledModel)
    return SimpleNamespace(model=model, clip=clip, vae=vae)


@cache
def mined(**settings):
    """Neighbor Sampler and Beyond Sampler, isotropic unless told: no vocabulary is read."""
    chosen = {"source": "isotropic", "count": 2} | settings
    (found, *_) = run(mining.NeighborSampler, clip=miniature().clip, concepts=NAMED, **chosen)
    return run(mining.BeyondSampler, mining=found, count=1)[0]


@cache
def erased(concepts=NAMED):
    """Closed-Form Edit without the bank: the MODEL and the erasure."""
    (found, *_) = run(
        mining.NeighborSampler,
        clip=miniature().clip,
        concepts=concepts,
        source="isotropic",
        count=2,
    )
    (found, _) = run(mining.BeyondSampler, mining=found, count=1)
    model, erasure, *_ = run(edit.ClosedFormEdit, model=miniature().model, mining=found, bank=False)
    return SimpleNamespace(model=model, erasure=erasure, mining=found)


def saved(erasure):
    """The erasure as it comes back from a file."""
    path = HOME / f"{len(list(HOME.iterdir()))}.safetensors"
    save_erasure(erasure, path)
    return load_erasure(path)


def short(**inputs):
    """LoRA Align with a training that is only long enough to change something."""
    given = {"model": miniature().model, "mining": erased().mining, "images": 1, "batch": 1}
    given |= {"steps": 2, "preview_every": 0, "learning_rate": 1e-3}
    return run(align.LoraAlign, **given | inputs)[0]


# ------------------------------------------------------------------------ the patch


def patches_of(model):
    return {
        key: entry[1]
        for key, (entry, *_) in model.patches.items()
        if isinstance(entry[1], ErasurePatch)
    }


def random_sd1():
    torch.manual_seed(0)
    patcher = random_model(comfy.supported_models.SD15, SD1, torch.float32)
    return patcher, random_erasure(patcher.model)


def claim_a_patch_is_made_anew_from_its_keys_and_weights():
    patcher, erasure = random_sd1()
    made = apply_erasure(patcher, erasure, 0.7, 0.3)
    assert patches_of(made)
    for key, patch in patches_of(made).items():
        again = type(patch)(patch.loaded_keys, patch.weights)
        weight = comfy.utils.get_attr(patcher.model, key)
        first, second = (
            one.calculate_weight(weight, key, 1.0, 1.0, None, lambda x: x) for one in (patch, again)
        )
        assert torch.equal(first, second) and not torch.equal(first, weight)
        assert again.concepts == patch.concepts


def claim_a_patch_is_prepared_for_dynamic_vram_and_gives_the_same_weight():
    low_vram = getattr(comfy.model_patcher, "LowVramPatch", None)
    if not hasattr(low_vram, "prepare"):
        raise Skipped("this ComfyUI does not prepare patches")
    patcher, erasure = random_sd1()
    made = apply_erasure(patcher, erasure, 1.0, 0.5)
    for name, reader in text_layers(patcher.model.diffusion_model).items():
        key = f"diffusion_model.{reader.path}.weight"
        patch = low_vram(key, made.patches)
        size = patch.memory_required()
        room = torch.zeros(size, dtype=torch.uint8)
        patch.prepare(room, None, copy=True, commit=True)
        # The tensors must have moved into the room that ComfyUI gave; all layers share the edit.
        _, _, edit, _, moved, *_ = patch.prepared_patches[0][1].weights
        assert room.data_ptr() <= moved.data_ptr() < room.data_ptr() + size
        assert edit is erasure.edits[reader.kind.stream]
        weight = reader.layer.weight
        given = patch(weight.detach().clone())
        assert torch.equal(given, weight_of(made, reader.path)), name
        assert torch.allclose(given, erasure.erased_weight(name, weight, 1.0, 0.5), atol=1e-6)
        patch.clear_prepared()
        assert patch.prepared_patches is None


def claim_what_dynamic_vram_pins_of_an_edit_is_a_kilobyte_a_layer_and_never_nothing():
    """To pin no byte fails: the host buffer it would lie in is empty."""
    low_vram = getattr(comfy.model_patcher, "LowVramPatch", None)
    if not hasattr(low_vram, "prepare"):
        raise Skipped("this ComfyUI does not prepare patches")
    patcher, erasure = random_sd1()
    made = apply_erasure(patcher, replace(erasure, lora={}))
    sizes = [low_vram(key, made.patches).memory_required() for key in patches_of(made)]
    assert len(sizes) == len(text_layers(patcher.model.diffusion_model))
    assert all(0 < size <= 1024 for size in sizes)


def claim_the_gain_of_a_norm_in_front_goes_where_dynamic_vram_moves_a_patch():
    low_vram = getattr(comfy.model_patcher, "LowVramPatch", None)
    if not hasattr(low_vram, "prepare"):
        raise Skipped("this ComfyUI does not prepare patches")
    torch.manual_seed(0)
    patcher = random_model(*NETWORKS["z_image"], torch.float32)
    erasure = random_erasure(patcher.model)
    made = apply_erasure(patcher, erasure)
    ((name, reader),) = text_layers(patcher.model.diffusion_model).items()
    patch = low_vram(f"diffusion_model.{reader.path}.weight", made.patches)
    room = torch.zeros(patch.memory_required(), dtype=torch.uint8)
    patch.prepare(room, None, copy=True, commit=True)
    gain = patch.prepared_patches[0][1].weights[-1]
    assert room.data_ptr() <= gain.data_ptr() < room.data_ptr() + len(room)
    weight = reader.layer.weight.detach()
    due = erasure.erased_weight(name, weight, gain=reader.gain)
    assert torch.allclose(patch(weight.clone()), due, atol=1e-6)
    assert not torch.allclose(erasure.erased_weight(name, weight), due, atol=1e-4)


def claim_a_layer_computes_with_a_prepared_patch_as_comfyui_casts_it():
    """What comfy/ops.py does with a module whose weight is loaded dynamically, after the cast."""
    low_vram = getattr(comfy.model_patcher, "LowVramPatch", None)
    if not hasattr(low_vram, "prepare"):
        raise Skipped("this ComfyUI does not prepare patches")
    patcher, erasure = random_sd1()
    made = apply_erasure(patcher, erasure)
    (name, reader), *_ = text_layers(patcher.model.diffusion_model).items()
    rows = torch.randn(2, 5, reader.layer.in_features)
    due = torch.nn.functional.linear(rows, erasure.erased_weight(name, reader.layer.weight))
    patch = low_vram(f"diffusion_model.{reader.path}.weight", made.patches)
    patch.prepare(torch.zeros(patch.memory_required(), dtype=torch.uint8), None)
    reader.layer.comfy_cast_weights = True
    reader.layer.weight_function = [patch]
    try:
        assert torch.allclose(reader.layer(rows), due, atol=1e-5)
    finally:
        reader.layer.weight_function = []


def claim_a_dynamic_patcher_on_the_cpu_draws_what_a_plain_one_draws():
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if dynamic is None:
        raise Skipped("this ComfyUI has no dynamic patcher")
    plain, erasure = random_sd1()
    made = dynamic(plain.model, load_device=CPU, offload_device=CPU)
    drawn = []
    encoding = random_encoding(plain.model)
    z, sigma = torch.randn(2, 4, 16, 16), plain.model.model_sampling.sigmas[[100, 800]]
    for patcher in (plain, made):
        one = apply_erasure(patcher, erasure)
        comfy.model_management.load_models_gpu([one])
        drawn.append(ComfyDiffusion(one, None).predict(z, sigma, encoding))
        comfy.model_management.unload_all_models()
    assert torch.equal(*drawn)


# ------------------------------------------------------------------------ words that are drawn


def claim_a_check_draws_what_diffusers_draws_and_leaves_the_model_alone():
    model, found, reported = miniature().model, mined(), []
    before = ComfyDiffusion(model, None).fingerprint
    with replaced(edit, "reporter", lambda *_: lambda *at: reported.append(at)):
        _, erasure, _, listed = run(
            edit.ClosedFormEdit, model=model, mining=found, bank=False, check=3
        )
    assert ComfyDiffusion(model, None).fingerprint == before
    assert reported[-2:] == [(3 + 2, 3 + 2), (3, 3)]
    lines = listed.splitlines()
    assert [line.endswith("when drawn") for line in lines] == [True] * 3 + [False] * len(lines[3:])
    effects = algorithm.scope_report(erasure, found.text, found.plan)
    concepts = found.plan.concepts
    due = check_effects(load_model("miniature"), erasure, concepts, effects, 3)[:3]
    for line, effect in zip(lines, due, strict=False):
        assert line.startswith(f"{effect.word}: ")
        shown = float(line.rsplit(", ", 1)[1].split(" %")[0])
        assert abs(shown - 100 * effect.image_moved) < 5, (line, effect)
    again = run(edit.ClosedFormEdit, model=model, mining=found, bank=False, check=3)[3]
    assert again == listed
    none = run(edit.ClosedFormEdit, model=model, mining=found, bank=False)[3]
    assert "when drawn" not in none


def claim_a_check_hears_cancel():
    def cancelled(*_):
        raise comfy.model_management.InterruptProcessingException

    diffusion = ComfyDiffusion(miniature().model, mined().text)
    management = "throw_exception_if_processing_interrupted"
    with replaced(comfy.model_management, management, cancelled):
        try:
            coarse_samples(diffusion, ["a photo of the dog"])
        except comfy.model_management.InterruptProcessingException:
            return
    raise AssertionError("it drew on")


# ------------------------------------------------------------------------ erased twice


def claim_an_erasure_that_is_on_the_model_already_is_refused():
    one, other = saved(erased().erasure), saved(erased().erasure)
    with refused("erased twice"):
        run(edit.ApplyErasure, model=erased().model, erasure=erased().erasure)
    (applied,) = run(edit.ApplyErasure, model=miniature().model, erasure=one)
    with refused("erased twice"):
        run(edit.ApplyErasure, model=applied, erasure=other)
    with refused("erased twice"):
        short(model=applied, erasure=other)
    with refused("erased twice"):
        run(files.SaveErasure, erasure=other, model=applied)


def claim_a_merged_erasure_of_what_is_on_the_model_is_refused():
    ship = erased("ship -> sea")
    (merged,) = run(edit.MergeErasures, first=saved(erased().erasure), second=ship.erasure)
    with refused("airplane"):
        run(edit.ApplyErasure, model=erased().model, erasure=merged)
    (both,) = run(edit.ApplyErasure, model=miniature().model, erasure=merged)
    with refused("ship"):
        run(edit.ApplyErasure, model=both, erasure=ship.erasure)


def claim_an_erasure_without_its_notes_is_known_by_its_matrix():
    bare = replace(saved(erased().erasure), provenance={})
    with refused("the same"):
        run(edit.ApplyErasure, model=erased().model, erasure=bare)


def claim_another_erasure_goes_on_top():
    (both,) = run(edit.ApplyErasure, model=erased().model, erasure=erased("ship -> sea").erasure)
    key = next(iter(patches_of(both)))
    assert len(both.patches[key]) == 2


# ------------------------------------------------------------------------ one tokenisation


def read_by_comfyui(clip, prompt):
    """The ids before padding that `encode` reads, by ComfyUI's own tokenizer."""
    (sections, *_) = clip.tokenize(prompt, disable_weights=True, return_word_ids=True).values()
    (section,) = sections
    words = [k for k, (_, _, word) in enumerate(section) if word]
    return section, max(words) + 1 if words else 1


def claim_escaped_brackets_are_counted_as_they_are_read():
    for name in ("sd1", "sdxl"):
        text = ComfyText(tiny_clip(name))
        for prompt in (r"saber \(fate\)", "a photo of the dog", "", r"(a:1.2) [b] \\(c\\)"):
            (ids,) = text.tokenize([prompt])
            section, end = read_by_comfyui(text.clip, prompt)
            assert ids == [token for token, _, _ in section][: end + 1], prompt
    named = (r"saber \(fate\)", "knight", "a photo of the {}")
    encoded = text.encode([named[2].replace("{}", named[0])])
    place = map_rows(text, [named], encoded).streams[CONTEXT][0]
    # The row of end-of-text meets the anchor's, and what follows it goes on one by one.
    _, end = read_by_comfyui(text.clip, named[2].replace("{}", named[0]))
    _, its = read_by_comfyui(text.clip, named[2].replace("{}", named[1]))
    assert place[end].item() == its and place[end + 1].item() == its + 1
    assert torch.equal(text.summary([prompt]), text.encode([prompt])[CONTEXT][:, end_of(text)])


def end_of(text):
    (ids,) = text.tokenize([r"(a:1.2) [b] \\(c\\)"])
    return len(ids) - 1


def claim_prompts_are_encoded_in_batches_as_comfyui_encodes_each():
    prompts = [f"a photo of the {word}" for word in ("cat", "dog", "red dog", "cat", "ship")]
    prompts += ["", "a red cat in the garden", r"saber \(fate\)"]
    for name, text in {**text_encoders(), **transformer_texts()}.items():
        clip, plain = text.clip, getattr(text, "_plain", {"disable_weights": True})
        encoders = [m for m in clip.cond_stage_model.modules() if isinstance(m, SDClipModel)]
        lengths = {
            (encoder, len(sections[0]))
            for prompt in prompts
            for encoder, sections in clip.tokenize(prompt, **plain).items()
            if sections
        }
        text.encode([""])  # finds out how many rows the family cuts off
        passes = []
        hooks = [
            encoder.register_forward_hook(lambda *_, passes=passes: passes.append(1))
            for encoder in encoders
        ]
        encoding = text.encode(prompts)
        for hook in hooks:
            hook.remove()
        assert len(encoders) <= len(passes) <= len(lengths), (name, len(passes), lengths)
        assert all("encode" not in vars(encoder) for encoder in encoders), "ComfyUI's own again"
        for number, prompt in enumerate(prompts):
            tokens = clip.tokenize(prompt, **plain)
            with on_device(clip.patcher.load_device):
                alone = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
            rows = encoding.take(torch.tensor([number]))
            there = rows.there(CONTEXT)[0]
            due = alone["cond"][0]
            front = getattr(text, "front", None)
            if front is not None:
                due = front.rows([due[None]], [alone])[0][0]
            elif "attention_mask" in alone and not any(part.padded for part in text.parts):
                due = due[alone["attention_mask"][0] > 0]
            if text.family and any("norm" in r for r in TEXT_FAMILIES[text.family]["readers"]):
                due = unit(due)
            assert torch.allclose(rows[CONTEXT][0][there], due, atol=1e-5, rtol=1e-4), (
                name,
                prompt,
            )
            if POOLED in rows:
                pooled = alone["pooled_output"]
                assert torch.allclose(rows[POOLED][:, 0], pooled, atol=1e-5, rtol=1e-4), name


def claim_a_textual_inversion_is_counted_and_read_as_comfyui_reads_it():
    folder = HOME / "embeddings"
    folder.mkdir(exist_ok=True)
    text = ComfyText(tiny_clip("sd1", folder))
    wide = text.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight.shape[1]
    from safetensors.torch import save_file

    save_file({"emb_params": torch.randn(3, wide)}, folder / "hero.safetensors")
    prompt = "a photo of the embedding:hero"
    section, end = read_by_comfyui(text.clip, prompt)
    (ids,) = text.tokenize([prompt])
    vectors = [token for token, _, _ in section[: end + 1] if isinstance(token, torch.Tensor)]
    assert len(vectors) == 3 and sum(k < 0 for k in ids) == 3 and len(ids) == end + 1
    whole = text.clip.encode_from_tokens(text.clip.tokenize(prompt, disable_weights=True))
    assert torch.allclose(text.encode([prompt])[CONTEXT][0], whole[0], atol=1e-6)
    rows = text.summary([prompt, "a dog"])
    assert torch.allclose(rows[0], whole[0, end], atol=1e-5)
    template = "a {} by embedding:hero"
    with replaced(ComfyText, "words", lambda _: ["cat", "dog"]):
        first = vocabulary_rows(text, template)
        assert torch.equal(vocabulary_rows(text, template), first)
        save_file({"emb_params": torch.randn(3, wide)}, folder / "hero.safetensors")
        assert not torch.allclose(vocabulary_rows(text, template), first, atol=1e-3)
        assert torch.allclose(
            vocabulary_rows(text, template),
            text.summary([template.replace("{}", word) for word in text.words()]),
            atol=1e-5,
        )
    pairs = algorithm.encode_pairs(text, parse_concepts("embedding:hero -> person", ["a {}"]))
    assert pairs.span[CONTEXT][0].tolist() == [False] * 2 + [True] * 75


# ------------------------------------------------------------------------ the same numbers


def same_edits(one, other):
    return all(torch.equal(edit.matrix, other.edits[s].matrix) for s, edit in one.edits.items())


def erased_by(text, concepts, settings):
    mined = algorithm.mine(text, concepts, settings.neighbor, settings.beyond)
    return algorithm.erase(mined, settings.solve)


def claim_the_nodes_and_the_core_find_the_same_to_the_bit():
    text = ComfyText(miniature().clip)
    for source, count in (("vocabulary", 12), ("isotropic", 2)):
        for beyond_seed in (None, 5):
            settings = Settings.of(
                source=source,
                neighbors=count,
                beyond=3,
                seed=2,
                beyond_seed=beyond_seed,
                preserve=("a photo of the dog",),
                exclude=("rocket",),
                bank=False,
            )
            theirs = erased_by(text, parse_concepts(NAMED), settings)
            (found, *_) = run(
                mining.NeighborSampler,
                clip=miniature().clip,
                concepts=NAMED,
                source=source,
                count=count,
                seed=2,
                leave_out="rocket",
            )
            (found, _) = run(
                mining.BeyondSampler,
                mining=found,
                count=3,
                seed=-1 if beyond_seed is None else beyond_seed,
                preserve="a photo of the dog",
            )
            ours = algorithm.erase(found, settings.solve)  # as Closed-Form Edit has it
            assert same_edits(ours, theirs), (source, beyond_seed)
            assert ours.provenance["settings"] == theirs.provenance["settings"]


def claim_neighbor_sampler_mines_the_words_that_the_model_draws_like_the_concept():
    few = ("aircraft", "jet", "plane", "castle", "flower", "violin", "lamp", "mouse", "truck")
    one, asked = miniature(), {"concepts": NAMED, "source": "predictions"}
    with refused("no model was given"):
        run(mining.NeighborSampler, clip=one.clip, **asked)
    defined = "taking off from the runway", "a castle on a hill"
    with (
        replaced(ComfyText, "words", lambda _: sorted(few)),
        replaced(definitions, "wordnet_definitions", lambda: defined),
    ):
        found, _, words = run(mining.NeighborSampler, clip=one.clip, model=one.model, **asked)
        beyond, _ = run(mining.BeyondSampler, mining=found)
    *listed, implied = words.splitlines()
    listed = {line.rsplit(" ", 1)[0] for line in listed}
    assert {"aircraft", "jet", "plane"} <= listed and not listed & {"castle", "flower", "violin"}
    assert implied == defined[0]
    sentences = mining.summary(beyond).split(", ")
    assert sentences[0].endswith(" neighbour words and 1 definitions are erased too")
    assert sentences[1].endswith(" beyond words are preserved")
    assert {"castle", "flower", "violin"} & set(beyond.beyond.words)


def claim_a_graph_is_made_again_from_its_provenance():
    text = ComfyText(miniature().clip)
    for source in ("vocabulary", "isotropic"):
        (found, *_) = run(
            mining.NeighborSampler,
            clip=miniature().clip,
            concepts="airplane -> tree\nship -> sea",
            source=source,
            count=3,
            s2=0.5,
            seed=7,
        )
        (found, _) = run(mining.BeyondSampler, mining=found, count=2, s2=0.4, seed=9)
        _, made, *_ = run(
            edit.ClosedFormEdit, model=miniature().model, mining=found, bank=False, lambda1=0.3
        )
        noted = saved(made).provenance
        lists = ("words", "exclude", "preserve")
        values = {k: tuple(v) if k in lists else v for k, v in noted["settings"].items()}
        named = [
            algorithm.Concept(c["name"], c["anchor"], tuple(c["templates"]))
            for c in noted["concepts"]
        ]
        again = erased_by(text, named, Settings.of(**values))
        assert same_edits(made, again), source


# ------------------------------------------------------------------------ parts that fit


def claim_a_second_beyond_sampler_is_refused():
    """It replaced what the first one preserves, without a word."""
    with refused("one Beyond Sampler"):
        run(mining.BeyondSampler, mining=mined())


def claim_the_same_words_are_never_erased_and_preserved():
    (found, *_) = run(mining.NeighborSampler, clip=miniature().clip, concepts=NAMED)
    with refused("would be both erased and preserved"):
        run(mining.BeyondSampler, mining=found, s2=0.9)


def claim_an_erasure_of_another_mining_is_refused_before_anything_is_drawn():
    other = erased("ship -> sea")
    with (
        replaced(ComfyDiffusion, "sample", lambda *_: 1 / 0),
        refused("the mining that the erasure was made from"),
    ):
        short(erasure=erased().erasure, mining=other.mining)
    reseeded = mined(seed=3)
    with refused("seed"):
        short(erasure=erased().erasure, mining=reseeded)


def claim_aligning_keeps_the_lora_that_an_erasure_has():
    first = short(erasure=erased().erasure)
    second = short(erasure=first, seed=1, rank=2)
    assert first.lora and second.lora.keys() == first.lora.keys()
    for name, (a, b) in second.lora.items():
        assert len(a) == 6 and torch.equal(a[:4], first.lora[name][0])
        assert torch.equal(b[:, :4], first.lora[name][1])


def claim_a_name_that_the_encoder_does_not_know_is_warned_about_in_the_view():
    for name, warned in (("飞机", "cannot read '飞机'"), ("xqzzt", "may not know 'xqzzt'")):
        node = type(
            "Sampler", (mining.NeighborSampler,), {"hidden": SimpleNamespace(unique_id=None)}
        )
        shown = node.execute(clip=miniature().clip, concepts=f"{name} -> tree", count=4).ui["text"]
        assert "are erased too" in shown[0] and any(warned in line for line in shown[1:]), shown


def claim_the_bank_is_read_only_where_it_is_used():
    def unread(*_, **__):
        raise AssertionError("the bank was read")

    with replaced(algorithm, "encode_bank", unread):
        (found, *_) = run(mining.NeighborSampler, clip=miniature().clip, concepts=NAMED, count=4)
        (found, _) = run(mining.BeyondSampler, mining=found)
        run(edit.ClosedFormEdit, model=miniature().model, mining=found, bank=False)


def claim_anchors_are_drawn_once():
    calls = []
    own = ComfyDiffusion.sample

    def counted(*given):
        calls.append(given)
        return own(*given)

    with replaced(ComfyDiffusion, "sample", counted):
        short(erasure=erased().erasure, seed=11)
        drawn = len(calls)
        short(erasure=erased().erasure, seed=11, rank=2, steps=3)
    assert drawn == len(calls) == 1


def given_options(model, **options):
    made = model.clone()
    made.model_options["transformer_options"].update(options)
    return made


def claim_the_fingerprint_of_a_model_covers_what_nodes_add_to_it():
    model = miniature().model
    lora = torch.ones_like(model.model.diffusion_model.out[2].weight)

    def with_lora():  # loaded anew each time
        made = model.clone()
        assert made.add_patches({"diffusion_model.out.2.weight": ("diff", (lora.clone(),))})
        return made

    variants = {
        "plain": model,
        "option": given_options(model, scale=1.5),
        "another value": given_options(model, scale=1.25),
        "LoRA": with_lora(),
        "sampling": SAMPLINGS["v"](model),
        "erasure": apply_erasure(model, erased().erasure),
        "shifted sampling": SAMPLINGS["CosXL"](model),
    }
    variants["dtype"] = model.clone()
    variants["dtype"].set_model_compute_dtype(torch.bfloat16)
    found = {name: ComfyDiffusion(made, None).fingerprint for name, made in variants.items()}
    assert None not in found.values() and len(set(found.values())) == len(found), found
    assert ComfyDiffusion(model.clone(), None).fingerprint == found["plain"]
    assert ComfyDiffusion(with_lora(), None).fingerprint == found["LoRA"]
    for family, (kind, layout) in (FAMILIES | NETWORKS).items():
        made = random_model(kind, layout, torch.float32)
        assert ComfyDiffusion(made, None).fingerprint, family


def claim_what_cannot_be_hashed_is_not_cached_and_not_resumed():
    scale = 0.5

    def patch(h, hsp, transformer_options):  # as FreeU adds it
        return h * scale, hsp

    def guided(args):  # as RescaleCFG adds it
        return args["uncond"] + scale * (args["cond"] - args["uncond"])

    drawn, sample = [], ComfyDiffusion.sample

    def counted(*given, **options):
        drawn.append(sample(*given, **options))
        return drawn[-1]

    freeu, rescaled = miniature().model.clone(), miniature().model.clone()
    freeu.set_model_output_block_patch(patch)
    rescaled.set_model_sampler_cfg_function(guided)
    with replaced(ComfyDiffusion, "sample", counted):
        short(erasure=erased().erasure, seed=12)
        for patched in (freeu, rescaled):
            assert ComfyDiffusion(patched, None).fingerprint is None
            for _ in range(2):
                short(model=patched, erasure=erased().erasure, seed=12)
    plain, *others = drawn
    assert len(others) == 4, "drawn anew each time"
    assert all((one - plain).abs().max() > 0.01 for one in others), "and by the patched MODEL"
    with refused("leave 'resume' empty"):
        short(model=freeu, erasure=erased().erasure, resume="freeu")


def claim_the_fingerprint_of_a_clip_covers_what_nodes_add_to_it():
    clip = tiny_clip("sd1")
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"

    def with_lora(value):
        made = clip.clone()
        assert made.add_patches({key: ("diff", (torch.full((64, 32), value),))}) == [key]
        return made

    skipped, padded, hooked = clip.clone(), clip.clone(), clip.clone()
    skipped.clip_layer(-2)
    padded.set_tokenizer_option("min_length", 5)
    made = [clip, skipped, padded, with_lora(1.0), with_lora(2.0)]
    found = [ComfyText(one).fingerprint for one in made]
    assert None not in found and len(set(found)) == len(found)
    assert ComfyText(with_lora(2.0)).fingerprint == found[-1]
    hooked.patcher.add_object_patch("clip_l.forward", lambda *_: found)
    assert ComfyText(hooked).fingerprint is None
    for name, text in {**text_encoders(), **transformer_texts()}.items():
        assert text.fingerprint, name


def claim_a_training_that_is_asked_for_twice_is_the_same():
    one, other = (short(erasure=erased().erasure, seed=4) for _ in range(2))
    assert all(torch.equal(a, other.lora[name][0]) for name, (a, _) in one.lora.items())
    assert all(torch.equal(b, other.lora[name][1]) for name, (_, b) in one.lora.items())
    assert any(b.any() for _, b in one.lora.values())


def claim_an_adversary_trains_another_lora_and_the_same_one_again():
    with replaced(adversarial, "PROMPTS", 16):
        plain, one, other = (
            short(erasure=erased().erasure, seed=4, adversarial=n, gradient_checkpointing=n > 0)
            for n in (0, 3, 3)
        )
    assert all(torch.equal(b, other.lora[name][1]) for name, (_, b) in one.lora.items())
    assert not all(torch.equal(b, plain.lora[name][1]) for name, (_, b) in one.lora.items())


def claim_a_resumed_training_draws_previews_of_new_steps_alone():
    drawn = []

    def counted(diffusion, *_):
        drawn.append(1)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return torch.zeros(2, *diffusion.latent_shape)

    given = {"erasure": erased().erasure, "resume": "previews", "preview_every": 1, "steps": 3}
    with replaced(align, "preview_latents", counted):
        try:
            short(**given)
        except KeyboardInterrupt:
            short(**given)
    assert len(drawn) == 3, drawn


# ------------------------------------------------------------------------ the MODEL's own sampling


def claim_a_model_that_cannot_be_loaded_whole_is_refused():
    model, management = miniature().model, comfy.model_management
    elsewhere = torch.device("meta")
    given = {"model": model, "erasure": erased().erasure, "mining": erased().mining}
    with replaced(model, "load_device", elsewhere):
        with (
            replaced(management, "vram_state", management.VRAMState.NO_VRAM),
            refused("start it without --novram"),
        ):
            run(align.LoraAlign, **given)
        with (
            replaced(management, "load_models_gpu", lambda *_, **__: None),
            refused("training needs the whole MODEL on"),
            training(model),
        ):
            pass
    if not hasattr(model, "cached_patcher_init"):
        raise Skipped("this ComfyUI has no dynamic patcher")
    with replaced(model, "is_dynamic", lambda: True), refused("load it with Load Checkpoint"):
        run(align.LoraAlign, **given)


def sampled_otherwise(patcher, kind, sampling, *range_of_sigmas):
    (made,) = getattr(advanced, kind)().patch(patcher, sampling, *range_of_sigmas)
    return made


SAMPLINGS = {
    "epsilon": lambda patcher: patcher,
    "v": lambda p: sampled_otherwise(p, "ModelSamplingDiscrete", "v_prediction", False),
    "v, zero terminal SNR": lambda p: sampled_otherwise(
        p, "ModelSamplingDiscrete", "v_prediction", True
    ),
    "EDM": lambda p: sampled_otherwise(p, "ModelSamplingContinuousEDM", "edm", 80.0, 0.002),
    "Playground": lambda p: sampled_otherwise(
        p, "ModelSamplingContinuousEDM", "edm_playground_v2.5", 80.0, 0.002
    ),
    "CosXL": lambda p: sampled_otherwise(
        p, "ModelSamplingContinuousEDM", "v_prediction", 120.0, 0.002
    ),
    "LCM": lambda p: sampled_otherwise(p, "ModelSamplingDiscrete", "lcm", False),
}


def claim_a_training_step_sees_what_comfyui_feeds_at_that_sigma():
    seen = {}
    for family in ("sd1", "sdxl"):
        kind, layout = FAMILIES[family]
        torch.manual_seed(0)
        plain = random_model(kind, layout, torch.float32)
        encoding = random_encoding(plain.model)
        z = torch.randn(2, 4, 16, 16)
        for name, patched in SAMPLINGS.items():
            patcher = patched(plain)
            comfy.model_management.load_models_gpu([patcher])
            diffusion = ComfyDiffusion(patcher, None)
            sigma = diffusion.times(2, torch.Generator().manual_seed(1))
            fed = []
            unet = patcher.model.diffusion_model
            handle = unet.register_forward_pre_hook(lambda _, given, fed=fed: fed.append(given))
            noise = torch.randn(z.shape)
            x, theirs = own_prediction(patcher, z, sigma, encoding, noise)
            ours = diffusion.predict(diffusion.noised(z, noise, sigma), sigma, encoding)
            handle.remove()
            (latents, times, *_), (own_latents, own_times, *_) = fed
            assert torch.allclose(latents, own_latents, atol=1e-5), (family, name)
            assert torch.allclose(times, own_times), (family, name)
            seen[name] = times
            made = diffusion.sampling.calculate_denoised(sigma, ours, x)
            wrong = float((made - theirs).abs().max() / theirs.abs().max())
            assert wrong < 1e-4, (family, name, wrong)
    assert (seen["EDM"] < 10).all() and not torch.allclose(seen["EDM"], seen["epsilon"])


def claim_a_model_that_samples_otherwise_can_be_aligned():
    for name in ("EDM", "v"):
        made = short(model=SAMPLINGS[name](miniature().model), erasure=erased().erasure)
        assert any(b.any() for _, b in made.lora.values()), name


class Noiseless(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """As comfy.model_sampling.IMG_TO_IMG_FLOW is in later releases."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return latent_image


def claim_a_sampling_that_adds_no_noise_is_refused_by_name():
    patched = miniature().model.clone()
    patched.add_object_patch("model_sampling", Noiseless(patched.model.model_config))
    with (
        replaced(ComfyDiffusion, "sample", lambda *_: 1 / 0),
        refused("Noiseless (ModelSamplingDiscrete, EPS), which has no noise"),
    ):
        short(model=patched, erasure=erased().erasure)


def claim_anchors_are_in_the_latents_of_the_models_own_format():
    """Playground's latents have another mean and scale than SDXL's; decoding must undo the same."""
    patched = SAMPLINGS["Playground"](miniature().model)
    diffusion = ComfyDiffusion(patched, ComfyText(miniature().clip), miniature().vae)
    z = torch.randn(1, *diffusion.latent_shape)
    layout = patched.get_model_object("latent_format")
    due = miniature().vae.decode(layout.process_out(z)).movedim(-1, 1)
    assert torch.allclose(diffusion.decode(z), due, atol=1e-5)


# ------------------------------------------------------------------------ the core's protocols


def claim_every_text_encoder_does_what_the_core_asks_of_it():
    for name, text in {**text_encoders(), "bundled": ComfyText(miniature().clip)}.items():
        with naming(name):
            check_text_encoder(text, RealEra.realera)


def claim_every_diffusion_does_what_the_core_asks_of_it():
    # Weights that are made in inference mode take no part in autograd; `training` mends what nodes
    # are given, and these are made outside of it.
    with torch.inference_mode(False):
        model, clip, vae, *_ = run(bundled.BundledModel)
        made = diffusions(vae) | {"bundled": ComfyDiffusion(model, ComfyText(clip), vae)}
        for name, diffusion in made.items():
            with naming(name):
                check_diffusion(diffusion, RealEra.realera)


def claim_the_bundled_transformer_is_read_whole_and_predicts_as_in_diffusers():
    tensors, prefix = load_file(TRANSFORMER), "model.diffusion_model."
    weights = {k.removeprefix(prefix): t.float() for k, t in tensors.items() if prefix in k}
    layout = comfy.model_detection.detect_unet_config(tensors, prefix)
    ours = mmdit.MMDiT(**layout, operations=comfy.ops.disable_weight_init, dtype=torch.float32)
    ours.load_state_dict(weights)  # no key is missing, none is left over
    with safe_open(TRANSFORMER, "pt") as file:
        config = json.loads(file.metadata()["config"])
    theirs = SD3Transformer2DModel.from_config(config["transformer"])
    theirs.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(weights))
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([900.0, 300.0])
    context = torch.randn(2, 77, 512, generator=g)
    pooled = torch.randn(2, 256, generator=g)
    expected = theirs(z, context, pooled, t).sample
    assert (ours(z, t, pooled, context) - expected).abs().max() < 1e-4 * expected.std()


def claim_the_bundled_t5_gives_the_rows_that_it_gives_in_transformers():
    with safe_open(T5, "pt") as file:
        config = json.loads(file.metadata()["config"])["text_encoder_3"]
    state = {name: tensor.float() for name, tensor in load_file(T5).items()}
    state["shared.weight"] = state.pop("shared.factor") @ state.pop("shared.matrix")
    gated = {"model_type": "t5", "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"}
    ours = comfy.text_encoders.t5.T5(config | gated, torch.float32, CPU, comfy.ops.manual_cast)
    ours.load_state_dict(state)  # no tensor is missing, none is left over
    theirs = T5EncoderModel(T5Config(**config))
    theirs.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    ids = torch.randint(9600, (2, 77), generator=torch.Generator().manual_seed(0))
    rows, _ = ours(ids, None)
    assert (rows - theirs.eval()(input_ids=ids).last_hidden_state).abs().max() < 1e-3


# ------------------------------------------------------------------------ transformers


def claim_the_text_of_every_transformer_does_what_the_core_asks_of_it():
    for name, text in {**transformer_texts(), "bundled": bundled_transformer().text}.items():
        with naming(name):
            check_transformer_text(text, RealEra.realera)


@cache
def bundled_transformer():
    model, clip, vae, *classifiers = run(bundled.BundledModel, checkpoint="bundled transformer")
    return SimpleNamespace(
        model=model, clip=clip, vae=vae, classifiers=classifiers, text=text_of(clip)
    )


def claim_sd3_has_rows_of_the_encoders_that_are_there():
    clip, rows = tiny_text("sd3", fill), {}
    model = clip.cond_stage_model
    encoders = {name: getattr(model, name) for name in ("clip_l", "clip_g", "t5xxl")}
    for kept in (("clip_l", "clip_g", "t5xxl"), ("clip_l", "clip_g"), ("t5xxl",)):
        for name, encoder in encoders.items():
            setattr(model, name, encoder if name in kept else None)
        rows[kept[0], kept[-1]] = text_of(clip).encode(["a dog"])[CONTEXT]
    whole, clips, t5 = rows.values()
    assert whole.shape[1] == 154 and clips.shape[1] == t5.shape[1] == 77
    assert torch.equal(whole[:, :77], clips) and torch.equal(whole[:, 77:], t5)


def claim_a_transformer_on_comfyui_is_erased_alike_by_patches_file_lora_and_rows():
    """Random weights of the true layouts, through ComfyUI's own classes and LoRA loader."""
    worst = {}
    for family, (kind, layout) in NETWORKS.items():
        torch.manual_seed(0)
        patcher = random_model(kind, layout, torch.float32)
        erasure = random_erasure(patcher.model)
        encoding, sampling = random_encoding(patcher.model), patcher.model.model_sampling
        z = torch.randn(2, *ComfyDiffusion(patcher, None).latent_shape)
        sigma = sampling.sigmas[[100, 800]]

        path, made = HOME / f"{family}.safetensors", HOME / f"{family} erased.safetensors"
        weights = patcher.model.diffusion_model.state_dict()
        comfy.utils.save_torch_file({k: t.contiguous() for k, t in weights.items()}, str(path))

        def drawn(one, rows=encoding, z=z, sigma=sigma):
            comfy.model_management.load_models_gpu([one])
            return ComfyDiffusion(one, None).predict(z, sigma, rows)

        before, patched = drawn(patcher), drawn(apply_erasure(patcher, erasure))
        scale = float(before.abs().max())
        assert (patched - before).abs().max() > 1e-3 * scale, family

        write_checkpoint(path, erasure, made, overwrite=True)
        file = random_model(kind, layout, torch.float32)
        missing = file.model.diffusion_model.load_state_dict(load_file(made))
        assert not missing.missing_keys and not missing.unexpected_keys, family

        lora = HOME / f"{family} lora.safetensors"
        lora.unlink(missing_ok=True)
        write_lora(patcher, erasure, lora, 1e-6)
        loaded = comfy.utils.load_torch_file(str(lora), safe_load=True)
        by_lora, _ = comfy.sd.load_lora_for_models(patcher, None, loaded, 1.0, 1.0)
        assert len(by_lora.patches) == len(text_layers(patcher.model.diffusion_model)), family

        ways = {"file": drawn(file), "LoRA": drawn(by_lora)}
        if not any(reader.norm for reader in text_layers(patcher.model.diffusion_model).values()):
            rows = {s: edit(encoding[s]) for s, edit in erasure.edits.items()}
            bare = replace(erasure, lora={})
            ways["rows"] = (
                patched + drawn(patcher, Encoding(rows)) - drawn(apply_erasure(patcher, bare))
            )
        worst[family] = {w: float((p - patched).abs().max()) / scale for w, p in ways.items()}
        assert all(wrong < 1e-4 for wrong in worst[family].values()), (family, worst[family])
    print("differ by", worst)


def claim_a_second_way_for_the_text_that_is_left_as_it_was_shows():
    for family in ("sd3", "flux1"):
        kind, layout = NETWORKS[family]
        torch.manual_seed(0)
        patcher = random_model(kind, layout, torch.float32)
        erasure, encoding = random_erasure(patcher.model), random_encoding(patcher.model)
        half = replace(erasure, edits={CONTEXT: erasure.edits[CONTEXT]})
        with refused("no edit of the pooled embedding"):
            apply_erasure(patcher, half)
        still = Edit.from_matrix(torch.eye(erasure.edits[POOLED].dim))
        left = replace(erasure, edits={**half.edits, POOLED: still})
        z, sigma = torch.randn(2, 16, 16, 16), patcher.model.model_sampling.sigmas[[100, 800]]
        both, one = (
            ComfyDiffusion(loaded(apply_erasure(patcher, e)), None).predict(z, sigma, encoding)
            for e in (erasure, left)
        )
        assert (both - one).abs().max() > 1e-3 * both.abs().max(), family


def quantised_flux(*kinds):
    """FLUX as ComfyUI quantises it, and the same numbers in float32; by the kind of file."""
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        raise Skipped("this ComfyUI has no layers of that kind")
    for kind in kinds:
        torch.manual_seed(0)
        whole = random_model(*NETWORKS["flux1"], torch.float32)
        network = whole.model.diffusion_model
        small = loaded_by_comfyui("flux1", network, kind, HOME / f"flux {kind}.safetensors")
        for name, layer in small.model.diffusion_model.named_modules():
            if isinstance(getattr(layer, "weight", None), comfy.quant_ops.QuantizedTensor):
                network.get_submodule(name).weight.data = layer.weight.dequantize()
        yield kind, small, whole


def claim_a_quantised_transformer_is_erased_as_the_one_that_it_stands_for():
    kinds = "float8_e4m3fn", "scaled_fp8", "int8_tensorwise", "mxfp8", "nvfp4"
    for kind, small, whole in quantised_flux(*kinds):
        with naming(kind):
            erasure, encoding = random_erasure(whole.model), random_encoding(whole.model)
            weights = {
                n: r.layer.weight for n, r in text_layers(whole.model.diffusion_model).items()
            }
            due = {name: erasure.erased_weight(name, weight) for name, weight in weights.items()}
            z, sigma = torch.randn(2, 16, 16, 16), whole.model.model_sampling.sigmas[[100, 800]]

            def drawn(patcher, z=z, sigma=sigma, rows=encoding):
                return ComfyDiffusion(patcher, None).predict(z, sigma, rows)

            before, exact = drawn(loaded(small)), drawn(loaded(whole))
            own = float((before - exact).norm())  # of inputs that are quantised, too
            fingerprint = ComfyDiffusion(small, None).fingerprint
            exact_erased = drawn(loaded(apply_erasure(whole, erasure)))
            changed = float((exact_erased - exact).norm())

            erased_small = loaded(apply_erasure(small, erasure))
            assert ComfyDiffusion(small, None).fingerprint == fingerprint
            assert ComfyDiffusion(erased_small, None).fingerprint != fingerprint
            for name, reader in text_layers(erased_small.model.diffusion_model).items():
                key = f"diffusion_model.{reader.path}.weight"
                # ComfyUI rounds at random, by a seed of the key.
                rounded = reader.layer.weight.requantize_from_float(
                    due[name].clone(),
                    scale="recalculate",
                    stochastic_rounding=comfy.utils.string_to_seed(key),
                )
                made = reader.layer.weight.dequantize()
                assert (made - rounded.dequantize()).norm() < 1e-3 * due[name].norm(), name
                assert (made - weights[name]).norm() > 0.03 * due[name].norm(), name
                assert torch.equal(plain_weight(small, key), weights[name]), name
            erased_small.unpatch_model(CPU)
            comfy.model_management.unload_all_models()
            erased_small.patch_model(CPU, lowvram_model_memory=1)
            assert (drawn(erased_small) - exact_erased).norm() < 1e-3 * changed + 2 * own
            erased_small.unpatch_model(CPU)


def claim_every_node_works_on_a_quantised_model_and_clip():
    for kind, small, whole in quantised_flux("scaled_fp8", "int8_tensorwise"):
        with naming(kind):
            clip = quantised_flux_text(fill, kind)
            asked = {"concepts": NAMED, "source": "isotropic", "count": 2}
            (found, *_) = run(mining.NeighborSampler, clip=clip, **asked)
            (found, _) = run(mining.BeyondSampler, mining=found, count=1)
            asked = {"mining": found, "bank": False, "check": 1}
            edited, erasure, *_ = run(edit.ClosedFormEdit, model=small, **asked)
            assert patches_of(edited)
            aligned = short(model=small, erasure=erasure, mining=found)
            assert all(b.any() for _, b in aligned.lora.values())
            with (
                replaced(gradient_checkpointing, "free_bytes", lambda _: 1),
                warnings.catch_warnings(record=True) as warned,
            ):
                again = short(model=small, erasure=erasure, mining=found)
            assert any("gradient checkpointing is on" in str(w.message) for w in warned)
            for layer, (_, b) in aligned.lora.items():
                assert torch.allclose(b, again.lora[layer][1], rtol=1e-2, atol=1e-6)
            (applied,) = run(edit.ApplyErasure, model=small, erasure=aligned)
            assert patches_of(applied).keys() == patches_of(edited).keys()
            rows, sigma = found.text.encode(["a dog"]), small.model.model_sampling.sigmas[[500]]
            z = torch.randn(1, 16, 16, 16)
            before, after = (
                ComfyDiffusion(loaded(patcher), None).predict(z, sigma, rows)
                for patcher in (small, applied)
            )
            assert after.isfinite().all() and not torch.equal(before, after)
            given = {"erasure": aligned, "filename": kind, "tolerance": 1e-6}
            name, _ = run(files.SaveErasure, model=small, **given)
            other, _ = run(files.SaveErasure, model=whole, **given)
            made, due = (load_file(HOME / "output/loras" / n) for n in (name, other))
            assert made.keys() == due.keys()
            for key, tensor in due.items():
                assert torch.allclose(made[key].float(), tensor, atol=1e-2), key


def claim_an_erasure_that_comfyui_would_leave_out_is_refused():
    patcher, erasure = random_sd1()
    reader = next(iter(text_layers(patcher.model.diffusion_model).values()))
    layer, weight = reader.layer, reader.layer.weight
    packed = torch.nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), False)
    with replaced(layer, "weight", packed), refused("its loader keeps it packed"):
        apply_erasure(patcher, erasure)
    with (
        replaced(patcher.model, "state_dict", lambda *_, **__: {}),
        refused("ComfyUI finds no weight diffusion_model."),
    ):
        apply_erasure(patcher, erasure)
    key, patch = next(iter(patches_of(apply_erasure(patcher, erasure)).items()))
    for wrong in (weight.detach()[:, :-1], weight.detach()[..., None, None]):
        for given in (patch, ErasurePatch(set(), (*patch.weights[:4], None, None, 1.0, None))):
            with refused("attn2.to_"):
                given.calculate_weight(wrong, key, 1.0, 1.0, None, lambda x: x)


def loaded(patcher):
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def claim_a_clip_and_a_model_of_different_families_are_refused():
    texts, sd1 = transformer_texts(), ComfyText(tiny_clip("sd1"))
    models = {name: random_model(*NETWORKS[name], torch.float32) for name in ("flux1", "sd3")}
    for model, text in (("flux1", texts["chroma"]), ("flux1", sd1), ("sd3", texts["flux1"])):
        with refused("connect the CLIP of the MODEL's own family"):
            ComfyDiffusion(models[model], text)
    with refused("the CLIP is for Stable Diffusion 3"):
        (found, *_) = run(
            mining.NeighborSampler,
            clip=bundled_transformer().clip,
            concepts=NAMED,
            source="isotropic",
        )
        run(edit.ClosedFormEdit, model=miniature().model, mining=found, bank=False)


def claim_an_erasure_of_another_family_is_refused_by_every_node():
    """Though its width fits."""
    erasure = replace(erased().erasure, provenance={"family": "chroma"})
    with refused("made for Chroma and the model is a U-Net"):
        run(edit.ApplyErasure, model=miniature().model, erasure=erasure)
    with refused("made for Chroma and the model is a U-Net"):
        run(files.SaveErasedCheckpoint, erasure=erasure, checkpoint=BUNDLED)
    with refused("made for Chroma and the model is a U-Net"):
        run(files.SaveErasure, erasure=erasure, model=miniature().model)


def claim_a_clip_whose_rows_a_part_of_the_model_makes_is_refused():
    class Krea2TEModel(torch.nn.Module):
        qwen3vl_4b = "there"

    clip = SimpleNamespace(cond_stage_model=Krea2TEModel())
    with refused("made by txtfusion, a part of the MODEL"):
        text_of(clip)


def claim_the_model_of_krea_2_and_anima_makes_the_rows_that_are_erased():
    if "krea2" not in NETWORKS:
        raise Skipped("ComfyUI before 2026")
    for family in ("krea2", "anima"):
        text = transformer_texts()[family]
        one = {"model": text.front.model}
        named = {"concepts": NAMED, "source": "isotropic", "count": 1}
        (found, *_) = run(mining.NeighborSampler, clip=text.clip, **one, **named)
        _, erasure, *_ = run(edit.ClosedFormEdit, **one, mining=found, bank=False)
        assert erasure.family == family
        aligned = short(**one, mining=found, erasure=erasure)
        assert len(aligned.lora) == len(text_layers(one["model"].model.diffusion_model))
        assert all(b.any() for _, b in aligned.lora.values())
        with refused("connect the CLIP of the MODEL's own family"):
            text_of(text.clip, miniature().model)


def claim_the_text_enters_by_the_layers_that_are_edited_and_no_other_way():
    """With their outputs held as of one prompt, another one of equal length changes no bit."""
    for family in (name for name in NETWORKS if "pipeline" not in TEXT_FAMILIES[name]):
        text, model = (
            transformer_texts()[family],
            loaded(random_model(*NETWORKS[family], torch.float32)),
        )
        layers = [reader.layer for reader in text_layers(model.model.diffusion_model).values()]
        torch.manual_seed(0)
        z, noise = torch.randn(2, 1, *ComfyDiffusion(model, None).latent_shape)
        sigma = model.model.model_sampling.sigmas[[500]]

        def drawn(prompt, hook, text=text, model=model, layers=layers, given=(z, noise, sigma)):
            z, noise, sigma = given
            tokens = text.clip.tokenize(prompt)
            extra = text.clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
            streams = {CONTEXT: extra.pop("cond")}
            if (pooled := extra.pop("pooled_output")) is not None:
                streams[POOLED] = pooled[:, None]
            handles = [layer.register_forward_hook(hook) for layer in layers]
            try:
                return own_prediction(model, z, sigma, Encoding(streams), noise, **extra)[1]
            finally:
                for handle in handles:
                    handle.remove()

        outputs = []
        first = drawn("a red cat", lambda _, given, output, outputs=outputs: outputs.append(output))
        free = drawn("a red dog", lambda *_: None)
        kept = iter(outputs)
        held = drawn("a red dog", lambda *_, kept=kept: next(kept))
        assert torch.equal(first, held) and next(kept, None) is None, family
        assert not torch.equal(first, free), family


def claim_the_bundled_transformer_forgets_what_it_is_told_to():
    one = bundled_transformer()
    (found, *_) = run(
        mining.NeighborSampler, clip=one.clip, concepts=NAMED, source="isotropic", count=4
    )
    model, erasure, *_ = run(edit.ClosedFormEdit, model=one.model, mining=found)
    prompts = ["a photo of the airplane"] * 4 + ["a photo of the dog"] * 4
    seen = []
    for patcher in (one.model, model):
        diffusion = ComfyDiffusion(patcher, one.text, one.vae)
        rows, empty = one.text.encode(prompts), one.text.encode([""])
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(prompts), *diffusion.latent_shape, generator=generator)
        z = diffusion.sample(rows, empty, noise, 10, 5.0)
        lines = one.classifiers[0].describe(diffusion.decode(z), prompts)
        seen += [sum(line.startswith("airplane") for line in lines[:4])]
        seen += [sum(line.startswith("dog") for line in lines[4:])]
    assert seen[0] >= 3 and seen[1] >= 3, f"not trained well enough to tell: {seen}"
    assert seen[2] <= 1 and seen[3] >= 3, seen
    for options in ({}, {"adversarial": 2}, {"adversarial": 2, "gradient_checkpointing": True}):
        with replaced(adversarial, "PROMPTS", 16):
            aligned = short(model=one.model, erasure=erasure, mining=found, **options)
        assert any(b.any() for _, b in aligned.lora.values())


# ------------------------------------------------------------------------ compare, files


def claim_the_bundled_model_classifies_concepts_and_styles():
    *_, concepts, styles = run(bundled.BundledModel)
    assert "airplane" in concepts.classes and "comic" in styles.classes
    images = torch.rand(2, 3, 64, 64)
    for classifier in (concepts, styles):
        seen = classifier.describe(images, ["a comic airplane"] * 2)
        assert all(line.split()[0] in classifier.classes for line in seen)


def claim_compare_reads_each_prompt_once_whatever_the_number_of_seeds():
    read, encode = [], ComfyText.encode

    def counted(text, prompts):
        read.extend(prompts)
        return encode(text, prompts)

    asked = ["a photo of the dog", "a photo of the ship"]
    one, given = miniature(), {"prompts": "\n".join(asked), "seeds": 3, "steps": 1}
    with (
        replaced(ComfyText, "encode", counted),
        replaced(compare.ui, "PreviewImage", lambda *_, **__: Shown),
    ):
        run(compare.Compare, before=one.model, after=one.model, clip=one.clip, vae=one.vae, **given)
    assert read == [*asked, ""]


def claim_compare_draws_a_family_with_smaller_latents_at_the_size_that_is_given():
    layout = SimpleNamespace(latent_channels=128, spacial_downscale_ratio=16)
    one = ComfyDiffusion(miniature().model, ComfyText(miniature().clip), None)
    with replaced(ComfyDiffusion, "latents", layout):
        assert compare._noise(one, 512, range(2)).shape == (2, 128, 32, 32)


def claim_images_and_latents_are_float32_where_comfyui_passes_half_precision():
    one = miniature()
    images = torch.rand(2, 64, 64, 3, dtype=torch.float16)
    vae = SimpleNamespace(decode=lambda latents: images)
    diffusion = ComfyDiffusion(one.model, ComfyText(one.clip), vae)
    decoded = diffusion.decode(torch.zeros(2, *diffusion.latent_shape))
    assert decoded.dtype == torch.float32 and decoded.shape == (2, 3, 64, 64)
    assert diffusion.encoded(torch.zeros(1, 4, 8, 8).half()).dtype == torch.float32
    for classifier in run(bundled.BundledModel)[3:]:
        assert len(classifier.describe(decoded, ["a dog"] * 2)) == 2


class Shown:
    """A picture that is shown nowhere."""

    as_dict = staticmethod(lambda: {"images": [{}] * 6})


def claim_a_file_has_a_name_that_every_system_holds():
    home = Path(folder_paths.get_output_directory()).resolve()
    path = files.new_path("loras", "%date:yyyy%/cat: 1")
    assert path.parent.parent == home / "loras" and path.parent.name.isdigit()
    assert path.name == "cat_ 1_00001_.safetensors"
    assert files.state_path("sub\\nul") == home / "realera/sub/nul_.safetensors"
    for name in ("", " "):
        with refused("the file name is empty"):
            files.new_path("loras", name)
    for name in ("../x", "..\\x", "/tmp/x"):
        with refused("leads out of"):
            files.new_path("loras", name)


@contextmanager
def naming(part):
    try:
        yield
    except Exception as error:
        raise AssertionError(part) from error


def main():
    claims = {name: made for name, made in globals().items() if name.startswith("claim_")}
    failed = 0
    with torch.inference_mode():
        for name, claim in claims.items():
            if ASKED and not any(part in name for part in ASKED):
                continue
            result = {"name": name, "failed": "", "skipped": ""}
            try:
                claim()
            except Skipped as reason:
                result["skipped"] = str(reason)
            except Exception:
                result["failed"] = traceback.format_exc()
                failed += 1
            print("CLAIM", json.dumps(result), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
