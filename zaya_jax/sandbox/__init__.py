"""Runs untrusted code, and decides whether it passes tests, without trusting it with anything."""

from zaya_jax.sandbox.checking import Verdict, check
from zaya_jax.sandbox.limits import Limits, Result
from zaya_jax.sandbox.probing import Protections, protections
from zaya_jax.sandbox.running import run

__all__ = ["Limits", "Protections", "Result", "Verdict", "check", "protections", "run"]
