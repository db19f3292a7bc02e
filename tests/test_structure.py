"""The house: which folders there are, and which may import which."""

import ast
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"zaya_jax", "pallas_kernels", "train", "convert", "tests", "notebooks", "docs"}
FILES = {"pyproject.toml", "README.md", "Makefile", "LICENSE", "CHANGELOG.md"}

# Each module may import those of its own rank or below, of ours.
RANKS = [
    ["pallas_kernels"],
    ["zaya_jax.errors", "zaya_jax.config", "zaya_jax.compilation", "zaya_jax.allocation"],
    ["zaya_jax.sandbox"],
    ["zaya_jax.layers", "zaya_jax.parallel", "zaya_jax.state", "convert"],
    ["zaya_jax.attention", "zaya_jax.moe", "zaya_jax.text"],
    ["zaya_jax.model", "zaya_jax.layouts", "zaya_jax.sharding"],
    ["zaya_jax.generation"],
    ["zaya_jax.reasoning"],
    [
        "zaya_jax.zaya",
        "zaya_jax.loading",
        "zaya_jax.memory",
        "convert.conversion",
        "convert.full_size",
    ],
    ["zaya_jax"],
    ["zaya_jax.evaluation", "zaya_jax.benchmark"],
    ["train"],
    ["zaya_jax.cli"],
]


def rank(module: str) -> int | None:
    """The place of the longest matching prefix; None for what is not ours."""
    names = {name: place for place, group in enumerate(RANKS) for name in group}
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((names[prefix] for prefix in prefixes if prefix in names), None)


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    wrong = []
    for file in [
        f
        for top in ("zaya_jax", "pallas_kernels", "train", "convert")
        for f in (ROOT / top).rglob("*.py")
    ]:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for target in imports(file):
            place = rank(target)
            if place is not None and place > rank(module) and not _deferred(file, target):
                wrong.append(f"{module} imports {target}")
    assert not wrong


def _deferred(file: Path, target: str) -> bool:
    """Whether the import stands inside a function or a type-checking block."""
    tops = ast.parse(file.read_text()).body
    direct = [n for n in tops if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in direct if isinstance(n, ast.Import) for a in n.names}
    names |= {
        f"{n.module}.{a.name}" for n in direct if isinstance(n, ast.ImportFrom) for a in n.names
    }
    return target not in names


def test_top_level_is_as_agreed():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tops = {path.split("/")[0] for path in listed.stdout.split()}
    assert {top for top in tops if not top.startswith(".")} <= FOLDERS | FILES


def test_every_pin_has_hashes_and_no_address():
    text = (ROOT / ".ci" / "constraints.txt").read_text()
    entries = [entry for entry in text.replace("\\\n", " ").splitlines() if "==" in entry]
    assert len(entries) > 50 and "://" not in text
    assert all("--hash=sha256:" in entry for entry in entries)
    pins = dict(entry.split(" ")[0].split(";")[0].split("==") for entry in entries)
    assert pins["jax"] == pins["jaxlib"] == "0.12.0"


def test_the_rocm_extra_never_asks_for_an_extra_that_does_not_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["rocm"] == ["jax[rocm7-local]"]
    assert "jax>=0.12.0,<0.13,!=0.12.0.1" in project["dependencies"]
