"""Where every parameter lies, and what the optimizer keeps of it, against golden files.

PYTHONPATH=tests python tests/zaya_jax/test_sharding.py    # writes them again
"""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from zaya_jax.config import ZayaConfig
from zaya_jax.errors import ConfigError
from zaya_jax.layouts import stack
from zaya_jax.model import init
from zaya_jax.sharding import AXES, map_with_paths, parameter_spec, parse_mesh, state_spec

GOLDEN = Path(__file__).parents[1] / "golden" / "sharding"
CASES = [("zaya1_8b", (16, 8, 1)), ("zaya1_8b", (8, 8, 2)), ("nano", (2, 2, 2))]


@cache
def stacked(preset: str) -> Any:
    """Shapes of all parameters."""
    config = ZayaConfig.preset(preset)
    return jax.eval_shape(lambda: stack(init(config, jax.random.key(0)), config))


def table(preset: str, sizes: tuple[int, ...]) -> str:
    """Two lines for each stacked parameter: itself, and what the optimizer keeps of it; of each
    dimension the axes that divide it, and the shape on each device."""
    mesh = jax.sharding.AbstractMesh(sizes, AXES)
    lines = [f"{preset} on " + ", ".join(f"{a}={s}" for a, s in mesh.shape.items())]

    def add(path: str, leaf: jax.ShapeDtypeStruct) -> None:
        lines.append(f"\n{path} {list(leaf.shape)}")
        for kind, spec in (
            ("parameter", parameter_spec(path)),
            ("optimizer", state_spec(path, leaf.shape, mesh)),
        ):
            part = jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.shape)
            entries = [*spec, *[None] * (leaf.ndim - len(spec))]
            where = [
                "-" if e is None else e if isinstance(e, str) else "+".join(e) for e in entries
            ]
            lines.append(f"  {kind}  ({', '.join(where)})  {list(part)}")

    map_with_paths(add, stacked(preset))
    return "\n".join(lines) + "\n"


def file_of(preset: str, sizes: tuple[int, ...]) -> Path:
    return GOLDEN / f"{preset}_{'x'.join(map(str, sizes))}.txt"


@pytest.mark.parametrize(("preset", "sizes"), CASES)
def test_every_parameter_lies_as_in_the_golden_file(preset, sizes):
    assert table(preset, sizes) == file_of(preset, sizes).read_text()


@pytest.mark.parametrize(("preset", "sizes"), CASES)
def test_a_device_keeps_its_share_of_the_optimizer_state(preset, sizes):
    """But for what does not divide: less than a thousandth of all."""
    mesh = jax.sharding.AbstractMesh(sizes, AXES)
    kept, total = [], []

    def add(path: str, leaf: jax.ShapeDtypeStruct) -> None:
        sharding = jax.sharding.NamedSharding(mesh, state_spec(path, leaf.shape, mesh))
        kept.append(np.prod(sharding.shard_shape(leaf.shape)))
        total.append(leaf.size)

    map_with_paths(add, stacked(preset)["params"])
    assert sum(total) <= mesh.size * sum(kept) < 1.001 * sum(total)


def test_a_mesh_is_written_as_its_axes():
    assert parse_mesh("context=2,data=4") == {"context": 2, "data": 4}
    for wrong in ("data", "data=0", "data=2,data=2", "model=2", "expert=x"):
        with pytest.raises(ConfigError, match="write it like data=2,expert=4,context=1"):
            parse_mesh(wrong)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        file_of(*case).write_text(table(*case))
        print(file_of(*case))
