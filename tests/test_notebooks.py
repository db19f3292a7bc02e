"""Every notebook runs on the embedded model, and its .ipynb is the executed form of its .py."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_notebook_runs_and_its_pair_is_current(script):
    notebook = jupytext.read(script)
    folder = {"metadata": {"path": str(FOLDER)}}  # Jupyter runs a notebook where it lies
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    pair = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [c.source for c in pair.cells] == [c.source for c in notebook.cells]
    code = [c for c in pair.cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
