"""HumanEval: functions to be written, and run against their tests in the sandbox."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from zaya_jax.evaluation.checkers import Checked
from zaya_jax.sandbox import check

ASK = """Complete this Python function. Answer with the whole function, and with the imports that \
it needs, in one block that begins with ```python.

```python
{prompt}
```"""
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.S | re.I)


def code_question(
    problem: dict[str, Any], allow_weak: bool = False
) -> tuple[str, str, Callable[[str], Checked]]:
    """The text of a question, the known solution, and the check of a response."""
    text = ASK.format(prompt=problem["prompt"].rstrip())
    return text, problem["canonical_solution"], partial(check_code, problem, allow_weak=allow_weak)


def check_code(problem: dict[str, Any], response: str, allow_weak: bool = False) -> Checked:
    """Runs the last code block of a response against the problem's tests.

    The prompt stands before it: with its imports and helpers, and with a function of the same name
    that does nothing, which the answer's replaces.
    """
    code = last_block(response)
    if code is None:
        return Checked(0.0, None, "no code block")
    name = problem["entry_point"]
    verdict = check(
        f"{problem['prompt']}\n{code}\n",
        f"{problem['test']}\ncheck({name})\n",
        functions=[name],
        setup=problem["prompt"],
        allow_weak=allow_weak,
    )
    return Checked(float(verdict.passed), code, verdict.detail)


def last_block(response: str) -> str | None:
    """The code between the last ``` fences; to the end where they were not closed."""
    blocks = _BLOCK.findall(response)
    return blocks[-1] if blocks else None
