"""The command line: the parser, and one function per command on top of the Python API.

Slow libraries are imported inside the commands that need them; `--help` and `merge` need none.
"""

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..settings import STRENGTHS
from . import erase, evaluate, suggest
from .options import file_options, model_option, number, overwrite_option, warn


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 after an error, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # consoles show the numbers of characters they lack
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given or ["--help"])
    # transformers prints a warning about torchvision, which RealEra does not use, at import.
    logging.getLogger("transformers.utils.import_utils").addFilter(
        lambda record: "requires torchvision" not in record.getMessage()
    )
    try:
        options.run(options)
    except KeyboardInterrupt:
        resumes = "; the same command resumes the run" if "engine" in options else ""
        print(f"interrupted: no file is half-written{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        expected = _is_message(error)
        if options.debug or not expected:
            traceback.print_exc()
        reason = str(error) or type(error).__name__
        if not expected:
            reason = (
                f"unexpected {type(error).__name__}. This is a bug in realera: please report it "
                "with the lines above"
            )
        print(f"realera {options.command}: {reason}", file=sys.stderr)
        return 1
    return 0


def _is_message(error: Exception) -> bool:
    """Whether an error is a message to the user; any other error is a bug.

    Messages are errors of the system (missing files, packages or memory), and a ValueError or
    FloatingPointError from a `raise` in this package, as opposed to a library or an operator.
    """
    from safetensors import SafetensorError

    if isinstance(error, (OSError, ImportError, MemoryError, SafetensorError)):
        return True
    if isinstance(error, RuntimeError):
        from ..training.loop import is_out_of_memory

        return is_out_of_memory(error)
    *_, origin = traceback.extract_tb(error.__traceback__)
    in_package = Path(origin.filename).is_relative_to(Path(__file__).parents[1])
    raised = not origin.line or origin.line.startswith("raise")
    return isinstance(error, (ValueError, FloatingPointError)) and in_package and raised


# ---------------------------------------------------------------- commands


def run_apply(options: argparse.Namespace) -> None:
    from ..checkpoints.layouts import locate
    from ..checkpoints.writing import (
        earlier_erasures,
        is_erased_copy,
        write_checkpoint,
        write_lora,
    )
    from ..edit.erasure_file import load_erasure
    from ..report.model_card import card_path, write_card
    from ..storage.safetensors_file import output_file_path, refuse_source

    refuse_source(options.out, options.erasure)
    erasure = load_erasure(options.erasure)
    warn(earlier_erasures(options.model))
    strengths = options.edit_strength, options.lora_strength
    if options.lora:
        if strengths != (1.0, 1.0):
            raise ValueError("a LoRA file has no strengths: set its strength where it is loaded")
        cuts = write_lora(options.model, erasure, options.out, options.tolerance, options.overwrite)
        for stream, cut in cuts.items():
            print(
                f"{options.out}: {stream} of rank {cut.rank}, {cut.error:.2%} of the edit left out"
            )
        return
    card = card_path(options.out, locate(options.model).is_dir())
    if not Path(options.out).is_dir():  # a folder that may be replaced is replaced as a whole
        output_file_path(card, options.overwrite)
    # A run that was stopped before the card has left the whole checkpoint.
    lacks_card = not options.overwrite and not card.exists()
    if not (lacks_card and is_erased_copy(options.model, erasure, options.out, *strengths)):
        write_checkpoint(options.model, erasure, options.out, options.overwrite, *strengths)
    print(options.out)
    print(f"open {write_card(options.out, options.model, options.overwrite)}: how to use it")


def run_merge(options: argparse.Namespace) -> None:
    from ..edit.erasure import Erasure
    from ..edit.erasure_file import load_erasure, save_erasure
    from ..storage.safetensors_file import make_writable, output_file_path, refuse_source

    refuse_source(options.out, *options.erasures)
    make_writable(output_file_path(options.out, options.overwrite).parent)
    merged = Erasure.merge([load_erasure(path) for path in options.erasures])
    save_erasure(merged, options.out, options.overwrite)
    print(options.out)


def run_info(options: argparse.Namespace) -> None:
    from ..checkpoints.families import open_network
    from ..checkpoints.file_kinds import adapter_of, kind_of
    from ..checkpoints.layouts import CONTROLNET, locate
    from ..checkpoints.writing import erasure_notes
    from ..edit.erasure_file import load_erasure
    from ..storage.safetensors_file import open_tensors

    path = locate(options.file)
    file = open_network(path)[1][0][0] if path.is_dir() else open_tensors(path)
    if "realera_erasure" in file.metadata:
        erasure = load_erasure(path)
        edits = ", ".join(f"{s} of width {edit.dim}" for s, edit in erasure.edits.items())
        print(f"RealEra erasure: {edits}; LoRA on {len(erasure.lora)} layers")
        print(json.dumps(erasure.provenance, indent=1, ensure_ascii=False))
        return
    if "realera" in file.metadata:
        print("carries an erasure:")
        print(json.dumps(erasure_notes(file), indent=1, ensure_ascii=False))
    adapter = adapter_of(file)
    if adapter is not None:
        rank = "" if adapter.rank is None else f", rank {adapter.rank} at most"
        print(f"{adapter.kind} of {adapter.layers} layers{rank}")
    elif kind := kind_of(file):
        print(kind)
    else:
        family, network = open_network(path)
        print(f"{family.title}, text embeddings of width {family.dim}, {family.dtype}")
        if any(name.startswith(CONTROLNET) for _, keys in network for name in keys.values()):
            print("with a ControlNet, which reads the same text: `realera apply` erases in both")


def run_cache(options: argparse.Namespace) -> None:
    from ..storage.cache import cache_folder, cached_files, empty_cache

    files = cached_files()
    size = sum(path.stat().st_size for path in files)
    if options.empty:
        empty_cache()
    else:
        for path in files:
            print(f"{path.stat().st_size / 1e6:10.1f} MB  {path.name}")
    gone = "removed from" if options.empty else "in"
    print(f"{len(files)} files, {size / 1e6:.1f} MB, {gone} {cache_folder()}")


# ---------------------------------------------------------------- the parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False
        return action.help if absent else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realera",
        description="Make a text-to-image model forget a concept, and what merely implies it.",
        epilog="Try 'realera demo' first: it needs no model and takes a few minutes.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Any:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=_Help)
        sub.add_argument("--debug", action="store_true", help="print the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    what = f"erase '{erase.DEMO}' from a bundled model and measure the result"
    erase.add_demo(command("demo", erase.run_demo, what))
    erase.add_erase(command("erase", erase.run_erase, "erase concepts from a model"))

    what = "suggest anchors for a concept, best first"
    suggest.add_suggest(command("suggest", suggest.run_suggest, what))

    sub = command("apply", run_apply, "write an erased checkpoint, or a LoRA, from an erasure")
    model_option(sub)
    sub.add_argument("erasure", help="erasure file (erasure.safetensors)")
    sub.add_argument("out", help="file to write; for a diffusers folder, folder to write")
    lora = "write a LoRA file instead of a checkpoint"
    sub.add_argument("--lora", action="store_true", help=lora)
    for part, name in (("edit", "closed form"), ("lora", "trained LoRA")):
        strength = f"factor of the {name}"
        sub.add_argument(f"--{part}-strength", type=number(STRENGTHS), default=1.0, help=strength)
    file_options(sub)

    sub = command("merge", run_merge, "merge erasures into one, as if fitted jointly")
    sub.add_argument("erasures", nargs="+", help="erasure files to merge")
    sub.add_argument("-o", "--out", required=True, help="erasure file to write")
    overwrite_option(sub)

    what = "measure Acc_e, Acc_s, Acc_g and H_o"
    evaluate.add_evaluate(command("evaluate", evaluate.run_evaluate, what))
    what = "list the words that an erasure changes, before any image is drawn"
    evaluate.add_scope(command("scope", evaluate.run_scope, what))

    sub = command("info", run_info, "print what a file is, and which erasures it carries")
    sub.add_argument("file", help="checkpoint, LoRA or erasure file, or diffusers folder")

    sub = command("cache", run_cache, "list the cache: encoded vocabularies, banks and images")
    sub.add_argument("--empty", action="store_true", help="remove the files of the cache")
    return parser
