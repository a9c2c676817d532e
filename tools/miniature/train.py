"""Train the miniature from nothing: `python -m tools.miniature.train --folder .state`.

The stages run in order, each is skipped once done, and a long one goes on where it stopped
(Ctrl-C and SIGTERM save first); more minutes for the decoder, the U-Net or the transformer train
them further.
`--export` writes what ships at any time, beside a running training too.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file
from transformers import CLIPTokenizer

from realera.miniature import TOKENIZER

from .autoencoder import prepare_latents, train_decoder, train_encoder
from .classifier import train_classifier
from .data import prepare_pictures
from .export import HOME, export, restore
from .runs import Stop
from .t5 import prepare_t5_rows, train_t5
from .text_encoder import prepare_contexts, train_text
from .tokens import prepare_words
from .transformer import train_transformer
from .unet import train_unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".state"), help="holds node_modules")
    parser.add_argument("--state", type=Path, default=Path(".state/miniature"))
    parser.add_argument("--warm", action="store_true", help="go on from the shipped weights")
    parser.add_argument("--export", action="store_true", help="only write what ships, and end")
    parser.add_argument("--out", type=Path, default=HOME, help="where to write what ships")
    parser.add_argument("--encoder-minutes", type=float, default=12)
    parser.add_argument("--text-minutes", type=float, default=4)
    parser.add_argument("--classifier-minutes", type=float, default=3)
    parser.add_argument("--decoder-minutes", type=float, default=30)
    parser.add_argument("--unet-minutes", type=float, default=300)
    parser.add_argument("--t5-minutes", type=float, default=5)
    parser.add_argument("--transformer-minutes", type=float, default=90)
    arguments = parser.parse_args()
    state: Path = arguments.state
    state.mkdir(parents=True, exist_ok=True)
    if arguments.export:
        export(state, arguments.out)
        return
    if arguments.warm:
        restore(state)
    stop = Stop()
    words, vectors = prepare_words(arguments.folder, state, TOKENIZER)
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    drawings = prepare_pictures(arguments.folder, state / "pictures.safetensors")
    pictures = load_file(state / "pictures.safetensors")["rgba"]
    if not train_encoder(state, pictures, arguments.encoder_minutes, stop):
        return
    if not train_text(state, tokenizer, words, vectors, arguments.text_minutes, stop):
        return
    latents = prepare_latents(state, pictures)
    contexts = prepare_contexts(state, tokenizer, drawings)
    stage = (state, pictures, latents, drawings, arguments.classifier_minutes, stop)
    if not train_classifier(*stage):
        return
    if not train_decoder(state, pictures, latents, arguments.decoder_minutes, stop):
        return
    if not train_unet(state, latents, contexts, drawings, arguments.unet_minutes, stop):
        return
    if not train_t5(state, tokenizer, words, vectors, arguments.t5_minutes, stop):
        return
    conditioned = (state, latents, contexts, prepare_t5_rows(state, tokenizer), drawings)
    if not train_transformer(*conditioned, arguments.transformer_minutes, stop):
        return
    export(state, arguments.out)


if __name__ == "__main__":
    main()
