"""Prints how we and PyTorch's own bfloat16 differ from PyTorch's float32, case by case, as a
Markdown table.

make oracle && .venv/bin/python tests/oracle/report.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "oracle")]

import cases  # noqa: E402
import numpy as np  # noqa: E402
from helpers import ORACLE  # noqa: E402
from test_parity import compute, kl  # noqa: E402

COLUMNS = (
    "case",
    "float32: error / spread",
    "same expert",
    "bfloat16: KL, ours",
    "KL, PyTorch",
    "same expert, ours",
    "same expert, PyTorch",
)


def row(name: str, folder: Path) -> str:
    ours, experts, reference = compute(folder)
    expected, routed = reference["logits"], reference["experts"]
    error = np.abs(ours - expected).max() / expected.std()
    low, low_experts, _ = compute(folder, "bfloat16")
    figures = [
        f"{error:.1e}",
        f"{np.mean(experts == routed):.2%}",
        f"{kl(expected, low):.1e}",
        f"{kl(expected, reference['bf16_logits']):.1e}",
        f"{np.mean(low_experts == routed):.2%}",
        f"{np.mean(reference['bf16_experts'] == routed):.2%}",
    ]
    return f"| {name} | " + " | ".join(figures) + " |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [ORACLE, TESTS / "oracle" / "reference.py", folder]
        subprocess.run(command, check=True, capture_output=True)
        print(f"| {' | '.join(COLUMNS)} |")
        print("|---" * len(COLUMNS) + "|")
        for name in cases.CASES:
            print(row(name, Path(folder) / name), flush=True)


if __name__ == "__main__":
    main()
