import zaya_jax.config  # noqa: F401  first, as the package's own imports come back here for the table
