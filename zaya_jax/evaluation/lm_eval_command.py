"""`zaya-lm-eval`: lm-eval's own command line, which finds models in installed packages.

lm-eval reads the entry points of `lm_eval.models` from the release behind 0.4.13 on. 0.4.13 knows
its own models only, and whatever was registered before it looks.
"""

import sys
from importlib.metadata import entry_points

from zaya_jax.errors import ZayaError

GROUP = "lm_eval.models"


def register_models() -> None:
    """Registers the models that installed packages offer lm-eval by entry point, without importing
    them. Call it before `lm_eval.simple_evaluate(model="zaya")`.

    Raises:
      ZayaError: lm-eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  registers its own, which come first
        from lm_eval.api.registry import model_registry
    except ImportError:
        raise ZayaError("lm-eval is not installed: pip install zaya-jax[lm-eval]") from None
    for point in entry_points(group=GROUP):
        if point.name not in model_registry:
            model_registry.register(point.name, target=point)


def main() -> None:
    """Runs lm-eval with the arguments of this process. Errors of ours are one line on stderr and
    exit code 2."""
    try:
        register_models()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except ZayaError as error:
        print(f"zaya: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
