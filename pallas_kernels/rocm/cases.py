"""What is compiled for the MI300X, measured and judged: each op's kernels at the sizes of real
models."""

import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels


class Sizes(NamedTuple):
    """Those of a model that its kernels depend on."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    expert_hidden: int
    router: int
    vocabulary: int
    window: int | None


Name = Literal["8B", "74B"]
ZAYA1_8B = Sizes("8B", 2048, 8, 2, 128, 16, 2048, 256, 262272, None)
ZAYA1_74B = Sizes("74B", 4096, 16, 2, 128, 24, 4096, 256, 262272, 4097)
MODELS: dict[Name, Sizes] = {"8B": ZAYA1_8B, "74B": ZAYA1_74B}
TOKENS = 8192  # of a training step's shard, or of a long prompt


Function = Callable[..., Any]


class Case(NamedTuple):
    """One op at one size.

    Attributes:
      name: of the op and the pass, "attention forward".
      kernels: the function of arrays, computed by our kernels.
      reference: the same, computed by XLA.
      args: shapes and dtypes of the arrays.
      flops: that the function needs at least.
      gradient: whether the results are those of `with_gradient`.
      integers: what arrays of integers may hold, by their place among all arrays: from the first
        number to before the second; zeros where nothing is said.
    """

    name: str
    kernels: Function
    reference: Function
    args: tuple[Any, ...]
    flops: float
    gradient: bool = False
    integers: Mapping[int, tuple[int, int]] = MappingProxyType({})

    @classmethod
    def training(
        cls,
        name: str,
        kernels: Function,
        reference: Function,
        args: tuple[Any, ...],
        flops: float,
        integers: Mapping[int, tuple[int, int]] = MappingProxyType({}),
    ) -> "Case":
        """A function and its gradient."""
        ours, theirs = with_gradient(kernels), with_gradient(reference)
        return cls(name, ours, theirs, args, flops, True, integers)

    def example(self, seed: int = 0) -> tuple[Any, ...]:
        """Random arguments; integers of two axes ascend, as ids of segments do."""
        leaves, tree = jax.tree.flatten(self.args)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        values = []
        for i, leaf in enumerate(leaves):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                values.append(jax.random.normal(keys[i], leaf.shape, leaf.dtype))
                continue
            low, high = self.integers.get(i, (0, 1))
            numbers = jax.random.randint(keys[i], leaf.shape, low, high, leaf.dtype)
            values.append(jnp.sort(numbers, axis=-1) if leaf.ndim > 1 else numbers)
        return jax.tree.unflatten(tree, values)

    @property
    def minimum(self) -> int:
        """Bytes of all arguments and results, each moved once; of a gradient, what the forward pass
        moves is moved again."""
        results = jax.eval_shape(self.reference, *self.args)
        again = [self.args, results[0]] if self.gradient else []
        arrays = [self.args, results, *again]
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def with_gradient(f: Function) -> Function:
    """A function of arrays as its results and the gradients of all floating-point arguments, for
    cotangents that equal the results."""

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_floats(*values: Any) -> Any:
            merged = list(leaves)
            for i, value in zip(floats, values, strict=True):
                merged[i] = value
            return f(*jax.tree.unflatten(tree, merged))

        out, pull = jax.vjp(of_floats, *(leaves[i] for i in floats))
        cotangents = jax.tree.map(
            lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else _no_gradient(x), out
        )
        return out, pull(cotangents)

    return run


def _no_gradient(x: jax.Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


def find_case(name: str, sizes: Sizes) -> Case:
    """The case of that name.

    Raises:
      ValueError: there is none.
    """
    found = {case.name: case for case in cases(sizes)}
    if name not in found:
        raise ValueError(f"no case {name!r}: one of {', '.join(found)}")
    return found[name]


def cases(sizes: Sizes, op: str | None = None) -> list[Case]:
    """Those of one op, or of all that have kernels.

    Raises:
      ValueError: no such op.
    """
    found: list[Case] = []
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        name = f"pallas_kernels.{module.name}.cases"
        wanted = module.ispkg and module.name != "rocm" and op in (None, module.name)
        if wanted and importlib.util.find_spec(name) is not None:
            found += importlib.import_module(name).cases(sizes)
    if not found:
        raise ValueError(f"no op {op!r} has kernels")
    return found
