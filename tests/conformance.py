"""Conformance tests for every TextEncoder and every Diffusion (`realera/text/encoding.py`,
`realera/pipelines/interface.py`).

Plain functions, so that the same checks run under pytest and inside ComfyUI's own interpreter.
`core` is the package: `realera` here, `RealEra.realera` there.
"""

from types import ModuleType
from typing import Any

import torch

PROMPTS = ["cat", "a photo of the airplane", "", "dog", "a red cat in the garden", "word " * 120]


def check_text_encoder(text: Any, core: ModuleType) -> None:
    encodings, alignment = core.text.encoding, core.text.token_alignment
    encoding = text.encode(PROMPTS)
    assert next(iter(encoding)) == encodings.CONTEXT, "the context comes first"
    for stream, rows in encoding.items():
        assert rows.ndim == 3 and len(rows) == len(PROMPTS), f"{stream}: [prompts, tokens, dim]"
        assert rows.dtype == torch.float32 and rows.isfinite().all(), f"{stream}: finite float32"
    (part,) = text.parts
    assert encoding[encodings.CONTEXT].shape[1] == part.length, "a row a token, padded and cut off"

    again = text.encode(PROMPTS)
    alone = encodings.Encoding.cat([text.encode([prompt]) for prompt in PROMPTS])
    for stream, rows in encoding.items():
        assert torch.equal(rows, again[stream]), f"{stream}: encoding twice gives the same"
        close = torch.allclose(rows, alone[stream], atol=1e-4, rtol=1e-3)
        assert close, f"{stream}: a prompt's rows do not depend on the others of its batch"

    ids = part.tokenize(PROMPTS)
    assert len({row[0] for row in ids}) == 1 and len({row[-1] for row in ids}) == 1
    assert ids[2] == [ids[0][0], ids[0][-1]], "the empty prompt is start and end-of-text"
    assert len(ids[-1]) > part.length, "token ids are not cut off"
    own = alignment.prompt_summaries(text, PROMPTS, encoding).cpu()
    summary = text.summary(PROMPTS)
    assert torch.allclose(summary.cpu(), own, atol=1e-3, rtol=1e-3), "summary is a row of encode"
    alignment.refuse_long_prompts(text, PROMPTS[:-1])
    try:
        alignment.refuse_long_prompts(text, PROMPTS)
    except ValueError as error:
        assert str(part.length) in str(error)
    else:
        raise AssertionError("a prompt that would be cut off is refused")

    one, other = text.encode(["a photo of the cat", "a photo of the red dog"])[encodings.CONTEXT]
    first = len(part.tokenize(["a photo of the"])[0]) - 1
    assert torch.allclose(one[:first], other[:first], atol=1e-4), "rows before the phrase stay"
    assert not torch.allclose(one[first], other[first], atol=1e-2), "and its own row does not"

    words = text.words()
    assert words == sorted(set(words)) and all(word.isalpha() for word in words)
    assert all(len(row) == 3 for row in part.tokenize(words[:: max(1, len(words) // 50)]))
    assert text.fingerprint == text.fingerprint != ""


def check_transformer_text(text: Any, core: ModuleType) -> None:
    """As `check_text_encoder`, for one whose prompts have as many rows as they need."""
    encodings, alignment = core.text.encoding, core.text.token_alignment
    prompts = PROMPTS[:-1]
    encoding = text.encode(prompts)
    alone = encodings.Encoding.cat([text.encode([prompt]) for prompt in prompts])
    for stream, rows in encoding.items():
        assert rows.dtype == torch.float32 and rows.isfinite().all(), f"{stream}: finite float32"
        assert torch.allclose(rows, alone[stream], atol=1e-4), f"{stream}: each prompt for itself"
    weights = encoding.weights.get(
        encodings.CONTEXT, torch.ones_like(encoding[encodings.CONTEXT][..., 0])
    )
    for n, prompt in enumerate(prompts):
        due = 0.0
        for part in text.parts:
            ids, rows = part.tokenize([prompt])[0], part.rows
            last = weights.shape[1] if rows is None else part.first + rows
            own = weights[n, part.first : last]
            assert (own[: len(ids)] == 1).all(), "a token's row counts one"
            one = part.padded or not part.causal
            padded = one and bool((own[len(ids) :] > 0).any())
            due += rows if rows is not None else len(ids) + padded
        assert abs(float(weights[n].sum()) - due) < 1e-3, "and all padding of a prompt one"

    named = ("a photo of the cat", "a photo of the dog")
    rows = [("cat", "dog", "a photo of the {}")]
    encoded, anchor = text.encode(named[:1]), text.encode(named[1:])
    places = alignment.map_rows(text, rows, encoded)
    moved = places.target(encoded, anchor)
    for part in text.parts:
        one, other = (part.tokenize([prompt])[0] for prompt in named)
        first = next(k for k, ids in enumerate(zip(one, other, strict=False)) if len(set(ids)) > 1)
        at = part.first + first
        own, its = encoded[encodings.CONTEXT][0], anchor[encodings.CONTEXT][0]
        same = torch.allclose(own[part.first : at], its[part.first : at], atol=1e-4)
        assert same == part.causal or at == part.first, "what a row sees"
        assert not torch.allclose(own[at], its[at], atol=1e-2), "the phrase has rows of its own"
        assert torch.equal(moved[encodings.CONTEXT][0, at], its[at]), "which become the anchor's"
        last, end = part.first + len(one) - 1, part.first + len(other) - 1
        assert torch.equal(moved[encodings.CONTEXT][0, last], its[end]), "and the end its end"
    for stream in encoded.streams.keys() - {encodings.CONTEXT}:
        assert torch.equal(moved[stream], anchor[stream]), f"{stream} becomes the anchor's"

    part, many = text.parts[0], ("dog", "red", "a red cat in the garden", "")
    summary = text.summary(many)
    assert summary.shape == (4, encoding[encodings.CONTEXT].shape[2])
    if part.causal:  # else padding, which others attend to, is left out of it
        due = alignment.prompt_summaries(text, many, text.encode(many)).cpu()
        assert torch.allclose(summary, due, atol=1e-3, rtol=1e-3), "summary is a row of encode"
    assert not torch.allclose(summary[0], summary[1], atol=1e-2), "words mean different things"
    alignment.refuse_long_prompts(text, prompts)
    try:
        alignment.refuse_long_prompts(text, ["word " * 1100])
    except ValueError as error:
        assert str(part.length) in str(error)
    else:
        raise AssertionError("a prompt that is longer than the encoder reads is refused")
    words = text.words()
    assert len(words) > 100 and all(word.isalpha() for word in words)
    assert text.fingerprint == text.fingerprint != ""


def check_diffusion(model: Any, core: ModuleType, steps: int = 2) -> None:
    encodings, layers_of = core.text.encoding, core.edit.text_layers
    training = core.training
    streams = model.text.encode(["a photo of the cat", "a dog"])
    for layer in layers_of.text_layers(model.network).values():
        columns = layer.layer.weight.shape[1]
        assert layer.kind.fits(columns, streams[layer.kind.stream].shape[-1]), layer.name
        assert model.network.get_submodule(layer.path) is layer.layer
    before = model.fingerprint
    generator = torch.Generator().manual_seed(0)

    times = model.times(64, generator)
    assert times.shape == (64,) and len(times.unique()) > 32, "random times"
    assert torch.equal(times, model.times(64, torch.Generator().manual_seed(0))), "of the generator"
    z = torch.randn(2, *model.latent_shape, generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    early, late = times.min().repeat(2), times.max().repeat(2)
    little, much = model.noised(z, noise, early), model.noised(z, noise, late)
    assert little.shape == z.shape and little.dtype == torch.float32
    near = torch.nn.functional.cosine_similarity
    assert near(little.flatten(), z.flatten(), 0) > near(much.flatten(), z.flatten(), 0)
    assert near(much.flatten(), noise.flatten(), 0) > near(little.flatten(), noise.flatten(), 0)

    with torch.no_grad():
        both = model.predict(much, late, streams)
        assert both.shape == z.shape and both.dtype == torch.float32 and both.isfinite().all()
        other = model.predict(much, late, streams.take(torch.tensor([1, 0])))
        assert not torch.equal(both, other), "the prediction reads the text"
        for stream in streams:
            mixed = encodings.Encoding({**streams, stream: streams[stream].flip(0)})
            assert not torch.equal(both, model.predict(much, late, mixed)), f"and its {stream}"
        torch.manual_seed(1)
        assert torch.equal(both, model.predict(much, late, streams)), "and nothing random"

    with training.lora.with_lora(model.network, 1, 0) as layers, training.in_place.differentiable():
        model.predict(much, late, streams).square().mean().backward()
        gradients = [b.grad for _, b in layers.values()]
        assert all(grad is not None and grad.isfinite().all() for grad in gradients)
        assert sum(float(grad.abs().sum()) for grad in gradients) > 0, "the LoRA can learn"

    empty = model.text.encode([""])
    drawn = [
        model.sample(streams, empty, start, steps, 3.0).float().cpu() for start in (z, z, noise)
    ]
    assert drawn[0].shape == z.shape and drawn[0].isfinite().all()
    assert torch.equal(drawn[0], drawn[1]), "the same noise gives the same latents"
    assert not torch.allclose(drawn[0], drawn[2]), "and other noise does not"
    images = model.decode(drawn[0])
    assert images.shape[:2] == (2, 3) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1

    assert model.fingerprint == before, "nothing was written into the network"
    weight = next(iter(layers_of.text_layers(model.network).values())).layer.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        assert model.fingerprint != before, "another weight is another model"
    finally:
        with torch.no_grad():
            weight.copy_(kept)
