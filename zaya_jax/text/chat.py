"""Conversations as prompts: the checkpoint's chat template, or ChatML where it has none."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zaya_jax.errors import InputError

THINK, END_THINK = "<think>", "</think>"

CHATML = """\
{{ bos_token }}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if not enable_thinking %}<think>
</think>

{% endif %}{% endif %}"""


class GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training in some templates; here it is only
    text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders messages ({"role", "content"}) to prompt text with a sandboxed jinja2 template.

    Templates see what transformers gives them. `tokens` are the texts of bos_token and the like.
    Raises `jinja2.TemplateError` on a source that is no template.
    """

    def __init__(self, source: str | None, tokens: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
        )
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _tojson
        self._tokens = tokens
        self._template = environment.from_string(CHATML if source is None else source)

    def render(
        self, messages: Sequence[dict[str, Any]], *, enable_thinking: bool = True, **values: Any
    ) -> str:
        """The prompt up to where the assistant's answer begins.

        Args:
          messages: the conversation, oldest first; at least one, each with a role and string
            content.
          enable_thinking: False pre-fills an empty reasoning block.
          **values: further variables of the template, such as `tools`.

        Raises:
          InputError: malformed messages, or ones that the template refuses.
        """
        if not messages:
            raise InputError("a conversation needs at least one message")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InputError(f"message {number} is not an object with a role")
            if not isinstance(message.get("content"), str):
                raise InputError(f"message {number} has no text content")
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
                **self._tokens,
                **values,
            )
        except Exception as error:  # a template is a program, and fails in as many ways
            raise InputError(f"the chat template refuses these messages: {error}") from None


class Answer(NamedTuple):
    """A response, split at the end of its reasoning."""

    thinking: str
    text: str


def split_thinking(response: str) -> Answer:
    """Separates `<think>` reasoning from the answer; an unclosed block is all reasoning, with no
    answer yet."""
    opened, _, rest = response.partition(THINK)
    if END_THINK not in response:
        return (
            Answer(rest.strip(), opened.strip())
            if THINK in response
            else Answer("", response.strip())
        )
    if THINK not in response or response.index(END_THINK) < response.index(THINK):
        opened, rest = "", response  # the prompt opened the block
    thinking, _, text = rest.partition(END_THINK)
    return Answer(thinking.strip(), (opened + text).strip())


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
