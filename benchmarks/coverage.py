"""How much of what people draw with RealEra covers, by the use of ComfyUI's own templates.

    pip download --no-deps comfyui-workflow-templates-json==0.1.123
    python -m benchmarks.coverage comfyui_workflow_templates_json-0.1.123-py3-none-any.whl

Sums the "usage" of the open templates for text to image in the index of that package; a template is
of a family whose file names one of its models. Prints the table of families, made of the files in
`realera/families`, and writes it between the marks in `docs/families.md`, and the sums to
`benchmarks/results/coverage.json`.
"""

import argparse
import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown_table
from realera.edit.text_layers import FAMILIES

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/families.md", ROOT / "benchmarks/results/coverage.json"
MARKS = re.compile(r"(?<=<!-- families -->\n\n).*?(?=\n\n<!-- families end -->)", re.DOTALL)
OTHER = "other"
UNET_LAYERS = "`attn2.to_k`, `attn2.to_v` of every block"


def usage(index: list[dict[str, Any]]) -> Counter[str]:
    """Use of the open templates for text to image: family, or name of the first model -> sum."""
    found: Counter[str] = Counter()
    for group in index:
        for template in group["templates"]:
            tags = template.get("tags") or []
            if "Text to Image" in tags and "API" not in tags:
                models = [template.get("name", ""), *(template.get("models") or [])]
                found[family_of(models)] += template.get("usage", 0)
    return found


def family_of(models: list[str]) -> str:
    """Name of the family that has one of the models; the last model where none has.

    models: name of a template, then those of its models
    """
    for family, known in FAMILIES.items():
        if set(models) & {*known["models"], *known.get("templates", ())}:
            return family
    return models[-1] if len(models) > 1 else OTHER


def table(used: Mapping[str, int]) -> str:
    """The table of families in `docs/families.md`."""
    total = sum(used.values())
    rows = []
    for name, known in sorted(FAMILIES.items(), key=lambda item: -used.get(item[0], 0)):
        readers = known.get("readers", [])
        layers = ", ".join(f"`{reader['single']}`" for reader in readers) or UNET_LAYERS
        parts = known.get("comfyui", {}).get("parts", [])
        encoders = dict.fromkeys(encoder for part in parts for encoder in part["encoders"])
        share = f"{100 * used.get(name, 0) / total:.1f} %"
        rows.append(
            [known["title"], layers, ", ".join(encoders) or "CLIP", known["verified"], share]
        )
    covered = sum(used.get(name, 0) for name in FAMILIES)
    rows.append(["all", "", "", "", f"{100 * covered / total:.1f} %"])
    head = ["family", "layers that read text", "text encoder", "verified on", "share of use"]
    return markdown_table([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", help="package comfyui-workflow-templates-json")
    wheel = parser.parse_args().wheel
    with zipfile.ZipFile(wheel) as package:
        (path,) = (name for name in package.namelist() if name.endswith("/templates/index.json"))
        used = usage(json.loads(package.read(path)))
    RESULTS.write_text(json.dumps(dict(used.most_common()), indent=1) + "\n", "utf-8")
    print(table(used))
    PAGE.write_text(MARKS.sub(lambda _: table(used), PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
