"""Faults: commands that are killed, that run out of disk space, or that run twice at once.

    nice python -m tools.faults --moments 50

Every command runs on a tiny model, in a folder that also holds files of somebody else, with a cache
of its own. It is

- killed at random moments, half of them spread over its run time and half right before one of the
  changes that it makes to its folders; then the same command runs again;
- run on a disk that is full from each of the files on that it opens to write; then again with room;
- run twice at once.

Whatever happens, a file that stands under its final name is whole, nobody else's file is touched,
and in the end there is what one undisturbed run leaves, to the bit, and nothing else. The exit
status is 1 when that does not hold.

Processes are forked from this one, which has the slow libraries in memory.
"""

import argparse
import hashlib
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
OURS = re.compile(r"\..+\.[0-9a-f]{8}-\d+\.realera-(tmp|old)")  # hidden, until it is whole
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events
STRANGERS = (  # of somebody else, some under names that look like ours
    "out/notes.txt",
    "out/groups/thesis.txt",
    "out/.realera-groups/thesis.txt",
    "out/.checkpoint.safetensors.tmp",
    "out/.scope.txt.00000000-1.realera-tmp",  # of another machine
    "out/.realera-run.txt",
    "cache/bank-of-england.safetensors",
    "cache/sd_xl-base-1.0.safetensors",
)
QUICK = ["--neighbors", "2", "--beyond", "2", "--rank", "2", "--batch", "2"]
NAMES = "concept,anchor\nairplane,tree\ndog,flower\nship,house\nhorse,tree\n"

Files = Mapping[str, str]  # path in a place -> hash of its content, "" for a folder


@dataclass(frozen=True)
class Command:
    """A command line, in which {home} is the folder of the output folder and the cache.

    engine: "local" or "ray", of `erase --concepts`
    """

    name: str
    line: Sequence[str]
    engine: str = "local"


@dataclass
class Ended:
    """How a run ended.

    status: exit status, negative for a signal
    output: text on stdout and stderr
    changes: changed files and folders below {home}, in order
    seconds: duration
    """

    status: int
    output: str
    changes: list[str]
    seconds: float


@dataclass
class Count:
    """The counts for one kind of fault and one command."""

    tries: int = 0
    hit: int = 0  # runs that the fault ended or made fail
    violations: int = 0


def commands(models: Path) -> list[Command]:
    """The commands on the models and erasures in the folder of `make_models`."""
    model, names = str(models / "tiny"), str(models / "names.csv")
    apply = ["apply", model, str(models / "erasure.safetensors")]
    out, many = ["-o", "{home}/out"], ["erase", model, "--concepts", names, "--group", "1", *QUICK]
    erase = ["erase", model, "-c", "airplane -> tree", *QUICK, "--steps", "30"]
    single = ["apply", "miniature", str(models / "miniature-erasure.safetensors")]
    return [
        Command("erase", [*erase, *out]),
        Command("apply to a folder", [*apply, "{home}/out/checkpoint"]),
        Command("apply to a file", [*single, "{home}/out/checkpoint.safetensors"]),
        Command("apply --lora", [*apply, "{home}/out/lora.safetensors", "--lora"]),
        Command("erase --concepts", [*many, "--steps", "3", *out]),
        Command("on Ray", [*many, "--steps", "3", "--engine", "ray", *out], "ray"),
    ]


def make_models(models: Path) -> None:
    """A tiny model, an erasure of it and one of the bundled model, and a CSV file of concepts."""
    from realera.cli import main

    from . import tiny

    tiny.pipeline().save_pretrained(models / "tiny")  # type: ignore[attr-defined]
    (models / "names.csv").write_text(NAMES, "utf-8")
    for model, name in ((str(models / "tiny"), "erasure"), ("miniature", "miniature-erasure")):
        line = ["erase", model, "-c", "airplane -> tree", *QUICK, "--no-bank", "--steps", "0"]
        main([*line, "--source", "isotropic", "-o", str(models / "made")])
        (models / "made" / "erasure.safetensors").rename(models / f"{name}.safetensors")
        shutil.rmtree(models / "made")


# ---------------------------------------------------------------- places and runs


def new_place(home: Path) -> Path:
    """An empty folder for one run, with strangers' files in it."""
    shutil.rmtree(home, ignore_errors=True)
    for name in STRANGERS:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"years of work on {name}")
    return home


def files_in(home: Path) -> dict[str, str]:
    """Every file and folder of a place but the strangers'."""
    found = {}
    for path in sorted(home.rglob("*")):
        name = str(path.relative_to(home))
        if name not in STRANGERS:
            folder = path.is_dir()
            found[name] = "" if folder else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def strangers(home: Path) -> list[tuple[str, int, int]]:
    """What tells whether somebody touched them: content, inode and time of the last change."""
    stats = [(home / name).stat() for name in STRANGERS if (home / name).is_file()]
    texts = [(home / name).read_text() for name in STRANGERS if (home / name).is_file()]
    return [(text, stat.st_ino, stat.st_mtime_ns) for text, stat in zip(texts, stats, strict=True)]


class Run:
    """A command in a forked process.

    on_change: called in it before each change to its place, with the change's number, from 0
    """

    def __init__(
        self, command: Command, home: Path, on_change: Callable[[int], None] = lambda number: None
    ) -> None:
        context = get_context("fork")
        self.began = time.monotonic()
        self.receiver, sender = context.Pipe(duplex=False)
        line = [part.format(home=home) for part in command.line]
        self.process = context.Process(target=_run, args=(line, home, on_change, sender))
        self.process.start()
        sender.close()

    def ends_within(self, seconds: float) -> bool:
        return self.receiver.poll(seconds)

    def kill(self, number: int) -> None:
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, number)

    def result(self) -> Ended:
        """The result, after the end of the process."""
        try:
            status, output, changes = self.receiver.recv()
            self.process.join()
        except EOFError:
            self.process.join()
            status, output, changes = self.process.exitcode, "", []
        return Ended(status, output, changes, time.monotonic() - self.began)


def _run(line: Sequence[str], home: Path, on_change: Callable[[int], None], sender: Any) -> None:
    from realera.cli import main

    inside, changes = str(home) + os.sep, list[str]()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not str(arguments[0]).startswith(inside):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        changes.append(str(arguments[1 if event == "os.rename" else 0]).removeprefix(inside))
        on_change(len(changes) - 1)

    os.environ["REALERA_CACHE"] = str(home / "cache")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest ignores it
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        sys.addaudithook(hook)
        try:
            status = main(line)
        except BaseException:
            traceback.print_exc()
            status = 99
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sender.send((status, output.getvalue(), changes))


# ---------------------------------------------------------------- faults


@dataclass
class Trial:
    """Faults on one command: what an undisturbed run leaves, and what was found wrong.

    home: folder that is made anew for every run
    changes: what the undisturbed run changes, in order; seconds: time that it takes
    """

    command: Command
    home: Path
    choice: random.Random
    counts: dict[str, Count] = field(default_factory=dict)
    wanted: Files = field(default_factory=dict)
    changes: Sequence[str] = ()
    seconds: float = 0.0

    def undisturbed(self) -> None:
        ended = Run(self.command, new_place(self.home)).result()
        if ended.status:
            raise RuntimeError(f"{self.command.name} fails undisturbed: {ended.output}")
        self.wanted, self.changes = files_in(self.home), ended.changes
        self.seconds = ended.seconds

    def first_change(self, pattern: str) -> int:
        """Number of the first change of a file whose name ends like that."""
        return next(n for n, name in enumerate(self.changes) if re.search(pattern, name))

    def killed(self, moments: int) -> None:
        """By each of SIGNALS at so many moments."""
        for number in SIGNALS:
            for n in range(moments):
                if n % 2:
                    self.killed_by(number, self.choice.uniform(0, self.seconds), None)
                else:
                    self.killed_by(number, None, self.choice.randrange(len(self.changes)))

    def killed_by(self, number: signal.Signals, after: float | None, change: int | None) -> None:
        """After so many seconds, or right before a change."""
        count = self.counts.setdefault(number.name, Count())
        count.tries += 1
        before = strangers(new_place(self.home))

        def on_change(n: int) -> None:
            if n == change:
                signal.raise_signal(number)

        run = Run(self.command, self.home, on_change)
        if after is not None and not run.ends_within(after):
            run.kill(number)
        ended = run.result()
        what = f"after {after:.2f} s" if after is not None else f"at change {change}"
        count.hit += ended.status != 0
        wrong = list(self._half_written(before))
        interrupted = number == signal.SIGINT and (
            ended.status == 130 or ended.output.endswith("KeyboardInterrupt\n")  # before any work
        )
        if not (interrupted or ended.status in (0, -number)):
            wrong.append(f"it ended with {ended.status}: {ended.output[-2000:]}")
        self._tell(f"{number.name} {what}", [*wrong, *self._again(before)], count)

    def on_full_disk(self, at_most: int) -> None:
        """From each of its changes on, or from so many drawn at random."""
        numbers = range(len(self.changes))
        for full in sorted(self.choice.sample(numbers, min(at_most, len(numbers)))):
            self.full_from(full)

    def full_from(self, change: int) -> None:
        count = self.counts.setdefault("full disk", Count())
        count.tries += 1
        before = strangers(new_place(self.home))

        def on_change(n: int) -> None:
            if n == change:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

        ended = Run(self.command, self.home, on_change).result()
        count.hit += ended.status != 0 or "cannot be written to" in ended.output
        wrong = list(self._half_written(before))
        for name in files_in(self.home):
            if OURS.fullmatch(Path(name).name):
                wrong.append(f"{name} is left")
        if ended.status and not (ended.status == 1 and "File too large" in ended.output):
            wrong.append(f"it ended with {ended.status}: {ended.output[-2000:]}")
        self._tell(f"disk full from change {change}", [*wrong, *self._again(before)], count)

    def two_at_once(self, times: int) -> None:
        """The second begins some part of the run time later."""
        count = self.counts.setdefault("two at once", Count())
        for n in range(times):
            count.tries += 1
            before = strangers(new_place(self.home))
            later = self.choice.uniform(0, self.seconds) if n else 0.0
            first = Run(self.command, self.home)
            time.sleep(later)
            runs = [first, Run(self.command, self.home)]
            ends = [run.result() for run in runs]
            count.hit += any(end.status for end in ends)
            wrong = []
            if all(end.status for end in ends):
                wrong.append("both failed")
            for end in ends:
                if end.status and not (
                    end.status == 1 and re.search("exists|another run", end.output)
                ):
                    wrong.append(f"one ended with {end.status}: {end.output[-2000:]}")
            wrong += self._differences(before)
            self._tell(f"two at once, the second {later:.2f} s later", wrong, count)

    def _tell(self, what: str, wrong: Sequence[str], count: Count) -> None:
        """Prints what was found wrong in one run: the first of it, and how much more."""
        if wrong:
            count.violations += 1
            more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
            print(f"{self.command.name}, {what}: {wrong[0]}{more}", file=sys.stderr)

    def _half_written(self, before: Sequence[object]) -> Iterator[str]:
        """What a run that was stopped may not leave."""
        from realera.cli.run_note import NAME
        from realera.storage.safetensors_file import open_tensors

        if strangers(self.home) != before:
            yield "a stranger's file was touched"
        for name, content in files_in(self.home).items():
            if any(OURS.fullmatch(part) for part in Path(name).parts):
                continue
            if self.wanted.get(name, content) != content:
                yield f"{name} is not what an undisturbed run leaves"
            elif content and name not in self.wanted and not name.endswith(NAME):  # a state
                try:
                    open_tensors(self.home / name)
                except ValueError as error:
                    yield f"{error}"

    def _again(self, before: Sequence[object]) -> Iterator[str]:
        """The same command, undisturbed; one that had ended already says that its file exists."""
        complete = not list(self._differences(before))
        ended = Run(self.command, self.home).result()
        if ended.status and not (complete and "exists" in ended.output):
            yield f"again, it ended with {ended.status}: {ended.output[-2000:]}"
        yield from self._differences(before)

    def _differences(self, before: Sequence[object]) -> Iterator[str]:
        if strangers(self.home) != before:
            yield "a stranger's file was touched"
        there = files_in(self.home)
        for name in sorted({*there, *self.wanted}):
            if name not in there:
                yield f"{name} is missing"
            elif name not in self.wanted:
                yield f"{name} is left over"
            elif there[name] != self.wanted[name]:
                yield f"{name} differs from that of an undisturbed run"


def table(trials: Sequence[Trial]) -> str:
    """Markdown: a row a command and fault."""
    rows = ["| command | fault | runs | stopped or failed | violations |", "|---|---|--:|--:|--:|"]
    for trial in trials:
        for fault, count in trial.counts.items():
            cells = trial.command.name, fault, count.tries, count.hit, count.violations
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=50, help="of each signal on each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a command of the table")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="realera-faults-") as folder:
        os.environ["RAY_TMPDIR"] = folder
        os.environ["REALERA_CACHE"] = f"{folder}/cache"
        models = Path(folder, "models")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            make_models(models)
        trials = []
        for command in commands(models):
            if options.only and command.name not in options.only:
                continue
            trial = Trial(command, Path(folder, "home"), random.Random(options.seed))
            trial.undisturbed()
            print(
                f"{command.name}: {trial.seconds:.1f} s, {len(trial.changes)} changes",
                file=sys.stderr,
            )
            trial.killed(options.moments)
            if command.engine == "local":
                trial.on_full_disk(options.moments)
                trial.two_at_once(options.moments)
            trials.append(trial)
    print(table(trials))
    return 1 if any(count.violations for trial in trials for count in trial.counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
