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
from zaya_jax.text.tools import END_THINK, THINK, check_tool_calls, check_tools

# Tools share the system turn; the results of several calls share a user turn.
CHATML = """\
{{ bos_token }}
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == "system" %}
{{ messages[0].content }}

{% endif %}
# Tools

These functions can be called:

{{ tools | map(attribute="function") | list | tojson }}

A call has this form, with strings as they are and every other value as JSON:

<zyphra_tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</zyphra_tool_call>

Give each parameter an element of its own, and each call. Results come back in
<zyphra_tool_response> elements.<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == "tool" -%}
{%- if loop.first or loop.previtem.role != "tool" -%}
<|im_start|>user
{% endif -%}
<zyphra_tool_response>
{{ message.content }}
</zyphra_tool_response>
{%- if loop.last or loop.nextitem.role != "tool" -%}
<|im_end|>
{%- endif %}

{% elif not (tools and loop.first and message.role == "system") -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{%- if message.content or not loop.first %}

{% endif -%}
<zyphra_tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}
<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}
</function>
</zyphra_tool_call>
{%- endfor -%}
<|im_end|>
{% endif -%}
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

    An assistant message may have `tool_calls`; messages with the role "tool" are their results.

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
        self.source, self.tokens = CHATML if source is None else source, dict(tokens)
        self._template = environment.from_string(self.source)

    def __reduce__(self):
        return ChatTemplate, (self.source, self.tokens)  # a compiled one goes to no process

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        enable_thinking: bool = True,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
        **values: Any,
    ) -> str:
        """The prompt up to where the assistant's answer begins.

        Args:
          messages: the conversation, oldest first; at least one, each with a role and string
            content, which may be missing beside tool calls. Calls are in OpenAI's form, or bare
            {"name", "arguments"}; arguments are an object, or one in JSON.
          enable_thinking: False pre-fills an empty reasoning block.
          tools: the functions on offer, in OpenAI's form or bare {"name", "parameters"}.
          add_generation_prompt: False leaves the conversation as it is, without the beginning of
            an answer.
          **values: further variables of the template.

        Raises:
          InputError: malformed messages or tools, or ones that the template refuses.
        """
        if not messages:
            raise InputError("a conversation needs at least one message")
        checked = [_check_message(number, message) for number, message in enumerate(messages)]
        functions = check_tools(tools)
        try:
            return self._template.render(
                messages=checked,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                tools=functions or None,
                **self.tokens,
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


def _check_message(number: int, message: Any) -> dict[str, Any]:
    """The message, with its tool calls as templates expect them."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"message {number} is not an object with a role")
    if calls := message.get("tool_calls"):
        if message["role"] != "assistant":
            raise InputError(f"message {number} has tool_calls, but is not the assistant's")
        try:
            calls = check_tool_calls(calls)
        except InputError as error:
            raise InputError(f"message {number}: {error}") from None
        content = message.get("content")
        message = {**message, "content": "" if content is None else content, "tool_calls": calls}
    if not isinstance(message.get("content"), str):
        raise InputError(f"message {number} has no text content")
    return message


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
