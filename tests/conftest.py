import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "oracle")]

from helpers import ORACLE  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Frees compiled programs after each file: a process may have 65,530 memory maps, of which each
    program takes some, and XLA crashes where it gets no more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> Path:
    """What PyTorch computes for every case, made once a session by the reference environment."""
    if not ORACLE.exists():
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("the PyTorch reference environment is not built (make oracle)")
    folder = tmp_path_factory.mktemp("oracle")
    subprocess.run([ORACLE, TESTS / "oracle" / "reference.py", folder], check=True)
    return folder
