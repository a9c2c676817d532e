"""Mutation testing: the share of small changes to a module that tests notice.

    nice python -m tools.mutation realera/text/token_alignment.py --sample 100

A mutant is a module with one operator, number, text, condition or statement changed. Its tests run
first in a fork of a process that has collected them and holds their session's fixtures; there the
code of the changed function takes the place of the function's own. A mutant that lives, and one
whose change lies outside of functions, runs once more, in a process that imports it from the start.

Prints the mutants that live, with line and change. Exit status 1 when they are too many.
"""

import argparse
import ast
import inspect
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = {  # module -> arguments of pytest
    "realera/text/token_alignment.py": ["tests/test_token_alignment.py", "tests/test_models.py"],
    "realera/storage/safetensors_file.py": ["tests/test_safetensors_file.py", "tests/test_disk.py"],
    "realera/edit/closed_form.py": ["tests/test_closed_form.py"],
    "realera/mining/vocabulary.py": ["tests/test_mining.py"],
    "realera/training/objective.py": ["tests/test_alignment.py"],
}
BAR = 0.9  # share of the mutants that tests are to notice
SLOW = 3.0  # seconds of a processor; a test that takes longer runs in the second process alone
PAIRS = (
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or),
    (ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift),
)  # fmt: skip
SWAPS: dict[type, type] = {**dict(PAIRS), **{b: a for a, b in PAIRS}}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    """A module with one change: `new` in the place of `old`, which is holder[key].

    tree: of the whole module; holder: fields of a node, or a list that is one of them
    """

    path: Path
    tree: ast.Module
    holder: Any
    key: Any
    old: ast.AST
    new: ast.AST

    def code(self) -> CodeType:
        self.holder[self.key] = self.new
        code = compile(ast.fix_missing_locations(self.tree), str(self.path), "exec")
        self.holder[self.key] = self.old
        return code

    def __str__(self) -> str:
        line = getattr(self.new, "lineno", 0)
        return f"{self.path.name}:{line}: {_told(self.old)}  ->  {_told(self.new)}"


# ---------------------------------------------------------------- mutants


def mutants(path: Path) -> list[Mutant]:
    """All of a module, in the order of its syntax tree."""
    tree = ast.parse(path.read_text("utf-8"))
    kept = {id(node) for part in _kept(tree) for node in ast.walk(part)}
    return [
        Mutant(path, tree, holder, key, old, ast.copy_location(new, old))
        for holder, key, old in _places(tree)
        if id(old) not in kept
        for new in _instead(old)
    ]


def _places(tree: ast.Module) -> Iterator[tuple[Any, Any, ast.AST]]:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, ast.AST):
                yield vars(parent), field, value
            elif isinstance(value, list):
                yield from ((value, n, part) for n, part in enumerate(value))


def _told(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) < 100 else f"{text[:97]}..."


def _kept(tree: ast.Module) -> Iterator[ast.AST]:
    """What no test has to notice: docstrings, annotations, the words of messages, and the checks of
    Python's that say what is so anyway (`frozen`, `strict`) or how it is shown (`repr`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node
        elif isinstance(node, ast.Raise):
            yield from filter(None, (node.exc, node.cause))
        elif isinstance(node, ast.FunctionDef):
            yield from filter(None, (node.returns,))
        elif isinstance(node, ast.arg | ast.AnnAssign):
            yield from filter(None, (node.annotation,))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "os.kill":
            yield from node.args  # another number would stop a process that belongs to others
        elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) or (
            isinstance(node, ast.keyword) and node.arg in ("frozen", "strict", "repr")
        ):
            yield node


def _instead(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a part of the program."""
    match node:
        case ast.Compare(left, ops, others):
            for n, op in enumerate(ops):
                yield ast.Compare(left, [*ops[:n], SWAPS[type(op)](), *ops[n + 1 :]], others)
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(str(value)):
            yield ast.Constant(f"{value}x")
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.If(test, body, orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.comprehension(target, iterated, [_, *_]):
            yield ast.comprehension(target, iterated, [], node.is_async)
        case ast.Return(value) if value is not None and not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.Expr() | ast.AugAssign() | ast.Continue() | ast.Break():
            yield ast.Pass()


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


# ---------------------------------------------------------------- into a module that is loaded


def functions(code: CodeType, owner: Any) -> Iterator[tuple[Any, CodeType]]:
    """The functions of a loaded module or class, methods included, each with its part of `code`."""
    for part in code.co_consts:
        if not isinstance(part, CodeType):
            continue
        live = vars(owner).get(part.co_name)
        if isinstance(live, type):
            yield from functions(part, live)
        elif live is not None:
            if isinstance(live, property):
                live = live.fget
            elif isinstance(live, cached_property):
                live = live.func
            elif isinstance(live, staticmethod | classmethod):
                live = live.__func__
            yield inspect.unwrap(live), part


def put(mutant: Mutant, module: Any) -> bool:
    """Puts the mutant's functions into the module; returns whether that changes any."""
    changed = False
    for live, code in functions(mutant.code(), module):
        if live.__code__ != code and live.__code__.co_freevars == code.co_freevars:
            live.__code__, changed = code, True
    return changed


# ---------------------------------------------------------------- runs


def forked(work: Callable[[], int], seconds: float) -> int:
    """The exit status of `work` in a fork of this process, without its output; killed when it takes
    more of a processor's time, which is the same on a busy machine, or waits for ever."""
    process = os.fork()
    if not process:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, 50 * seconds)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            with tempfile.TemporaryDirectory() as cache:  # what one encodes, no other reads
                os.environ["REALERA_TEST_CACHE"] = os.environ["REALERA_CACHE"] = cache
                status = work()
        except BaseException:
            status = 99
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Session:
    """A pytest plugin that runs the collected tests once for each mutant.

    lived: numbers of the mutants that no test noticed
    """

    def __init__(self, module: str, chosen: Sequence[Mutant]) -> None:
        self.module, self.chosen = module, chosen
        self.lived: list[int] = []
        self.seconds = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        quick, began = [], _spent()
        for item in session.items:
            start = _spent()
            if not _passes(item):
                raise RuntimeError(f"{item.nodeid} fails without a mutant")
            if _spent() - start < SLOW:
                quick.append(item)
        self.seconds = _spent() - began
        module, killers = import_module(self.module), dict[pytest.Item, None]()

        def run(mutant: Mutant | None, saying: int) -> int:
            if mutant is not None and not put(mutant, module):
                return 0
            for item in [*reversed(killers), *(item for item in quick if item not in killers)]:
                if not _passes(item):
                    os.write(saying, str(session.items.index(item)).encode())
                    return 1
            return 0

        for number, mutant in enumerate([None, *self.chosen], -1):
            reading, saying = os.pipe()
            status = forked(lambda m=mutant, s=saying: run(m, s), 10 + 5 * self.seconds)  # type: ignore[misc]
            os.close(saying)
            killer = os.read(reading, 20).decode()
            os.close(reading)
            if mutant is None and status:
                raise RuntimeError("tests that pass once fail when they run again in a fork")
            if killer:
                killers.pop(session.items[int(killer)], None)
                killers[session.items[int(killer)]] = None
            if mutant is not None and not status:
                self.lived.append(number)
        return True


def _spent() -> float:
    """Seconds that processors spent on this process and on those that it started."""
    return sum(os.times()[:4])


def _passes(item: pytest.Item) -> bool:
    """Runs one test, whichever ran before it; fixtures of its module and of the session stay."""
    from _pytest.runner import runtestprotocol

    module: Any = item.parent
    item.session._setupstate.teardown_exact(module)
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=module))


def survivors(path: str, chosen: Sequence[Mutant]) -> list[Mutant]:
    """The mutants that the module's tests do not notice."""
    module = path.removesuffix(".py").replace("/", ".")
    # Libraries that bring plugins are imported before pytest; in the suite that is an error.
    tests = [*TESTS[path], "-p", "no:randomly", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with tempfile.NamedTemporaryFile("r") as told:

        def together() -> int:
            session = Session(module, chosen)
            status = pytest.main(tests, plugins=[session])
            Path(told.name).write_text(json.dumps([session.lived, session.seconds]))
            return int(status)

        if forked(together, 1e6):
            raise RuntimeError(f"the tests of {path} do not pass")
        lived, seconds = json.loads(told.read())

    def alone(mutant: Mutant) -> int:
        load = SourceFileLoader.get_code

        def code_of(self: Any, name: str) -> CodeType | None:
            return mutant.code() if name == module else load(self, name)

        SourceFileLoader.get_code = code_of  # type: ignore
        return int(pytest.main(["-x", *tests]))

    return [
        chosen[n]
        for n in lived
        if not forked(lambda n=n: alone(chosen[n]), 60 + 5 * seconds)  # type: ignore[misc]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="of the table TESTS")
    parser.add_argument("--sample", type=int, default=100, help="mutants a module, at random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    sys.dont_write_bytecode = True
    for library in ("torch", "diffusers.pipelines", "transformers", "peft", "hypothesis"):
        import_module(library)
    below = False
    for path in options.modules:
        every = mutants(ROOT / path)
        count = min(options.sample, len(every))
        lived = survivors(path, random.Random(options.seed).sample(every, count))
        share = 1 - len(lived) / count
        below |= share < BAR
        print(f"{path}: {count} of {len(every)} mutants, {share:.1%} noticed; these live:")
        print("\n".join(f"  {mutant}" for mutant in lived))
    return int(below)


if __name__ == "__main__":
    sys.exit(main())
