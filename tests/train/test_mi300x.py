"""The kit for AMD GPUs, where there is none."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.rocm.cases import Case
from train import mi300x


def main(out) -> tuple[int, dict]:
    with pytest.raises(SystemExit) as ended:
        mi300x.main(out)
    return ended.value.code, json.loads(out.read_text())


@pytest.fixture
def quick(monkeypatch):
    """Checks that need no GPU, made short."""
    monkeypatch.setattr(mi300x, "parity", lambda kernels: {"passed": True, "differences": {}})
    monkeypatch.setattr(mi300x, "training", lambda: {"passed": True, "losses": [3.0, 1.0]})


def test_what_needs_a_gpu_is_skipped_and_says_so(quick, tmp_path, capsys):
    code, report = main(tmp_path / "report.json")
    assert code == 0 and report["machine"]["versions"]["jax"] == jax.__version__
    checks = report["checks"]
    skipped = [name for name, check in checks.items() if "skipped" in check]
    assert {"parity of our kernels", "moe training", "experts by tokens", "zaya bench"} < {*skipped}
    assert {*checks} - {*skipped} == {"parity of XLA", "training"}
    assert "moe training: skipped" in (shown := capsys.readouterr().out)
    assert shown.endswith("NOT on an AMD GPU\n")


def test_a_check_that_fails_or_breaks_is_reported_beside_the_rest(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(mi300x, "parity", lambda kernels: {"passed": False, "differences": {}})
    code, report = main(tmp_path / "report.json")
    assert code == 1 and report["checks"]["training"]["passed"]

    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mi300x, "training", broken)
    code, report = main(tmp_path / "report.json")
    assert code == 1 and report["checks"]["training"]["error"] == "RuntimeError: out of memory"


def test_kernels_that_differ_or_change_fail():
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    good = Case("double", lambda x: x * 2, lambda x: x + x, (x,), 0.0)
    details = mi300x.kernel(good)
    assert details["passed"] and details["difference"] == 0 and details["seconds"] > 0
    assert not mi300x.kernel(good._replace(kernels=lambda x: x * 2.2))["passed"]
    calls = iter(range(100))
    callback = jax.ShapeDtypeStruct((8, 4), jnp.float32)

    def racing(x):
        def noise(x):
            return x * (2 + 1e-6 * next(calls))

        return jax.pure_callback(noise, callback, x)

    details = mi300x.kernel(good._replace(kernels=racing))
    assert not details["same_bits"] and not details["passed"]
