"""The requirements of the package, and of the node pack in ComfyUI."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMFYUI_BRINGS = {"torch", "transformers", "safetensors", "numpy", "pillow", "tqdm"} | {
    "huggingface_hub"  # which transformers needs
}
COMMAND_LINE_ALONE = {"diffusers"}


def specifiers(lines) -> dict[str, str]:
    """Name of a package -> its line."""
    return {re.match(r"[\w-]+", line)[0].lower(): line for line in lines}


def dependencies() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return specifiers(re.findall(r'"(.+)"', listed))


def test_the_pack_asks_for_what_the_package_needs_and_comfyui_lacks():
    needed = dependencies()
    for name in COMFYUI_BRINGS | COMMAND_LINE_ALONE:
        del needed[name]
    assert specifiers((ROOT / "requirements.txt").read_text("utf-8").split()) == needed


def test_the_zip_of_the_registry_leaves_out_nothing_that_comfyui_reads():
    ignored = (ROOT / ".comfyignore").read_text("utf-8").split()
    for folder in ("nodes", "realera", "web", "locales", "workflows", "subgraphs", "docs"):
        assert (ROOT / folder).is_dir() and f"{folder}/" not in ignored
