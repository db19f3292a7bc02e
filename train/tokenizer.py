"""Builds the nano model's tokenizer: bytes, and the fixed parts of its prompts as single tokens.

    python -m train.tokenizer FILE

The result is kept as a file beside the checkpoint and never rebuilt: an id that moves would spoil
every checkpoint and data set made before.
"""

import sys

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from zaya_jax.text.chat import END_THINK, THINK

SPECIAL = ("<pad>", "<bos>", "<|im_end|>", "<|im_start|>")  # ids 0 to 3
FRAGMENTS = (
    THINK,
    END_THINK,
    "user\n",
    "assistant\n",
    " + ",
    " - ",
    " * ",
    " =",
    ", ",
    "Spell this word backward (example: sun -> nus): ",
    "State the final answer to the following arithmetic problem: ",
    "Solve the following multiplication: ",
    ". Give only the result as your final answer.",
    "Find the Greatest Common Divisor (GCD) of these numbers: ",
    ". Give only the GCD as your final answer.",
    "Your task is to convert a number between two different bases.\n\n",
    "If the target base is > 10, use lowercase letters a-z for digits above 9.\n\n",
    "Now, convert the ",
    " number ",
    " to ",
    "base-",
    "binary",
)
# Came later, behind the bytes, so that no id moved: the prompt of aggregation.
AGGREGATION = (
    "\n\nBelow are the ends of several attempts at this problem. Some may be wrong. Compare them, "
    "check what they do step by step, and give one better solution.\n\n",
    "<candidate>\n",
    "\n</candidate>\n",
)


def build() -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges: any text comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *FRAGMENTS, *alphabet, *AGGREGATION]
    core = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    # Not special: reasoning marks stay in decoded text, and fragments are only text.
    core.add_tokens([AddedToken(text, normalized=False) for text in (*FRAGMENTS, *AGGREGATION)])
    return core


if __name__ == "__main__":
    build().save(sys.argv[1])
