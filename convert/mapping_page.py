"""Writes docs/mapping.md from the mapping table: `python -m convert.mapping_page`."""

from pathlib import Path

from convert.mapping import Entry, copies, mapping
from zaya_jax.config import ZayaConfig

PAGE = Path(__file__).parent.parent / "docs" / "mapping.md"
_HEAD = """# Names of a checkpoint's tensors

Written by `python -m convert.mapping_page` from the table (`convert/mapping.py`) that loading,
saving, converting and verifying use; shapes are those of ZAYA1-8B. The Orbax layout has our leaves
under their own names.

The legacy layout has two layers for each of ours, and applies a residual scale where a sub-layer
begins, we where one ends: what layer {2i+2} begins with is `model.res_scale` after the last layer.

| leaf | current Hugging Face | legacy Zyphra | shape |
|---|---|---|---|
"""
_NUMBERS = {"2": "{2i}", "3": "{2i+1}", "4": "{2i+2}"}


def page() -> str:
    """The page's text."""
    config = ZayaConfig.preset("zaya1_8b")
    table = mapping(config)
    lines = [
        _line(path, entry)
        for path, entry in table.items()
        if "/layers/" not in path or "/layers/1/" in path
    ]
    dropped = [
        f"\n`{name}` is read where it equals `{table[path].name}` bit for bit, never written.\n"
        for name, path in copies(config).items()
    ]
    return _HEAD + "".join(lines) + "".join(dropped)


def _line(path: str, entry: Entry) -> str:
    name, legacy = entry.name, entry.legacy[0]
    if "/layers/1/" in path:
        path, name = path.replace("/1/", "/{i}/"), name.replace("layers.1.", "layers.{i}.")
        start, _, rest = legacy.removeprefix("model.layers.").partition(".")
        legacy = f"model.layers.{_NUMBERS[start]}.{rest}"
    if entry.transform == "stack":
        legacy = legacy.replace("experts.0.", "experts.{e}.")
    shape = "x".join(map(str, entry.shape)) + (", float32" if entry.always_float32 else "")
    return f"| `{path}` | `{name}` | `{legacy}` | {shape} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
