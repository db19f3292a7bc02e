"""Tool calls in the text of a response ("zaya_xml"): found as it streams, and read by schema.

    <zyphra_tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </zyphra_tool_call>

Nothing is escaped: a string stands verbatim between two newlines, every other value as JSON. So a
value ends at the first `</parameter>` that is followed by another parameter or the end of its call;
anything else in it, tags too, is part of it. An element may hold several functions. Where the
closing tag of the element is missing, or that of its last function, the calls still count. What is
no whole call is text, to the letter.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import NoneType
from typing import Any, NamedTuple

from zaya_jax.errors import InputError

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<zyphra_tool_call>", "</zyphra_tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"

TAGS = (THINK, END_THINK, CALL, END_CALL, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)
WHOLE_TAG = re.compile(
    rf"({THINK}|{END_THINK}|{CALL}|{END_CALL}|{END_FUNCTION}|{END_PARAMETER}"
    rf"|(?:{FUNCTION}|{PARAMETER})[ \t]*[^<>\s][^<>\n]*>)"
)
OPEN_NAME = re.compile(rf"(?:{FUNCTION}|{PARAMETER})[^<>\n]*")

JSON_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
    NoneType: "null",
}
ANY = frozenset(JSON_TYPES.values())


@dataclass(frozen=True)
class ToolCall:
    """A function to call; `source` is the text it was read from."""

    name: str
    arguments: dict[str, Any]
    source: str = field(default="", compare=False, repr=False)


class Token(NamedTuple):
    """A whole tag, or some text without one."""

    source: str
    tag: str = ""  # one of TAGS, or empty for text
    name: str = ""  # of a function or parameter


class ToolCallParser:
    """Separates a response that arrives in pieces into text (str) and calls, in order.

    Text is given out as soon as it can be no part of a call; a call, once its element is closed or
    something else follows. Texts and `ToolCall.source` joined are the response again, however it
    was cut into pieces. Reasoning (`<think>`, also unclosed) is text, whatever it holds. So is a
    call that breaks off before its end, since arguments may be missing.

    How a value is read:
      - It is JSON of a type, other than string, that its schema allows (NaN and Infinity are none);
      - or else its text, verbatim, if the schema allows strings;
      - or else whatever JSON it is, or its text if it is none.
    Where there is no schema, or one that names no type (`$ref`), every type is allowed. Of a
    parameter given twice the last one counts.

    Args:
      tools: the functions on offer, in OpenAI's form; their schemas are used to read arguments.
        Calls of other functions are given too.
      thinking: True where the prompt ends inside a reasoning block.

    Raises:
      InputError: malformed tools.
    """

    def __init__(self, tools: Sequence[dict[str, Any]] = (), *, thinking: bool = False):
        functions = [tool["function"] for tool in check_tools(tools)]
        self._schemas = {function["name"]: function.get("parameters") for function in functions}
        self._next: Callable[[Token], None] = self._thinking if thinking else self._text
        self._events: list[str | ToolCall] = []
        self._unfinished = ""  # perhaps the beginning of a tag
        self._held: list[str] = []  # perhaps the source of a call
        self._whole = 0  # how much of `_held` is a whole call, whose element may go on
        self._name = self._key = ""  # of the last function and its last parameter
        self._arguments: dict[str, Any] = {}
        self._value = slice(0)  # of the last parameter, in `_held`

    def feed(self, piece: str) -> list[str | ToolCall]:
        """What became certain with this piece of the response."""
        text = self._unfinished + piece
        cut = text.rfind("<")
        if cut < 0 or not _begins_tag(text[cut:]):
            cut = len(text)
        self._unfinished = text[cut:]
        for token in _tokens(text[:cut]):
            self._next(token)
        return self._take()

    def finish(self) -> list[str | ToolCall]:
        """What was held back, at the end of the response."""
        if self._unfinished:
            self._next(Token(self._unfinished))
            self._unfinished = ""
        self._give_held()
        return self._take()

    # States: each takes a token, and sets `_next` where another one takes the next token.

    def _text(self, token: Token) -> None:
        if token.tag == CALL:
            self._held.append(token.source)
            self._next = self._element
        else:
            self._events.append(token.source)
            self._next = self._thinking if token.tag == THINK else self._text

    def _thinking(self, token: Token) -> None:
        self._events.append(token.source)
        if token.tag == END_THINK:
            self._next = self._text

    def _element(self, token: Token) -> None:
        """Before the first function of an element, or after a function."""
        if token.tag == FUNCTION:
            self._give_call()
            self._held.append(token.source)
            self._name, self._key, self._arguments = token.name, "", {}
            self._next = self._function
        elif token.tag == END_CALL and self._whole:
            self._end_call(token)
        else:
            self._between(token)

    def _function(self, token: Token) -> None:
        """Before the first parameter, or after a `</parameter>` that may be part of a value."""
        if token.tag == PARAMETER:
            self._read_value()
            self._held.append(token.source)
            self._key, self._value = token.name, slice(len(self._held), None)
            self._next = self._parameter
        elif token.tag in (END_FUNCTION, END_CALL):
            self._read_value()
            self._end_call(token)
        elif self._key and not token.source.isspace():
            self._parameter(token)
        else:
            self._between(token)

    def _parameter(self, token: Token) -> None:
        self._next = self._parameter
        if token.tag == END_PARAMETER:
            self._value = slice(self._value.start, len(self._held))
            self._next = self._function
        self._held.append(token.source)

    def _between(self, token: Token) -> None:
        """Only whitespace may stand between tags; anything else ends the attempt at a call."""
        if token.source.isspace():
            self._held.append(token.source)
        else:
            self._give_held()
            self._text(token)

    def _end_call(self, token: Token) -> None:
        self._held.append(token.source)
        self._whole = len(self._held)
        self._next = self._element
        if token.tag == END_CALL:
            self._give_call()
            self._next = self._text

    def _read_value(self) -> None:
        if self._key:
            text = "".join(self._held[self._value]).removeprefix("\n").removesuffix("\n")
            schema = _property(self._schemas.get(self._name), self._key)
            self._arguments[self._key] = read_value(text, schema)

    def _give_call(self) -> None:
        if self._whole:
            source = "".join(self._held[: self._whole])
            self._events.append(ToolCall(self._name, self._arguments, source))
            self._held, self._whole = self._held[self._whole :], 0

    def _give_held(self) -> None:
        self._give_call()
        self._events += self._held
        self._held = []

    def _take(self) -> list[str | ToolCall]:
        """The events so far, with neighbouring texts joined."""
        taken: list[str | ToolCall] = []
        for kind, events in groupby(self._events, key=type):
            group: list[Any] = list(events)
            taken += ["".join(group)] if kind is str else group
        self._events = []
        return taken


def parse_tool_calls(
    response: str, tools: Sequence[dict[str, Any]] = (), *, thinking: bool = False
) -> tuple[str, list[ToolCall]]:
    """A whole response as (the text around its calls, its calls), as `ToolCallParser` finds them.

    The text is verbatim, reasoning included: `split_thinking` comes after.
    """
    parser = ToolCallParser(tools, thinking=thinking)
    events = [*parser.feed(response), *parser.finish()]
    text = "".join(event for event in events if isinstance(event, str))
    return text, [event for event in events if isinstance(event, ToolCall)]


def check_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools in OpenAI's form, {"type": "function", "function": {"name", ...}}; a bare function
    is wrapped.

    Raises:
      InputError: a tool is no function, or has no name, a name that is taken, or no object schema.
    """
    if not isinstance(tools, list | tuple):
        raise InputError("tools are not a list")
    checked: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type", "function") != "function":
            raise InputError(f"tool {number} is not a function")
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[^<>\s]+", name):
            raise InputError(f"tool {number} needs a name without spaces and angle brackets")
        if name in checked:
            raise InputError(f"tool {number} has the name of an earlier one, {name!r}")
        schema = function.get("parameters") or {}
        if not isinstance(schema, dict) or not isinstance(schema.get("properties", {}), dict):
            raise InputError(f"tool {number} ({name}): its parameters are no JSON schema object")
        checked[name] = {"type": "function", "function": function}
    return list(checked.values())


def check_tool_calls(calls: Any) -> list[dict[str, Any]]:
    """The calls of an assistant message in OpenAI's form, with arguments as an object.

    A bare {"name", "arguments"} is wrapped, arguments in JSON are parsed; an `id` stays.

    Raises:
      InputError: a call has no function name, or its arguments are no JSON object.
    """
    if not isinstance(calls, list | tuple):
        raise InputError("tool_calls are not a list")
    checked = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"tool call {number} has no function name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict):
            raise InputError(f"tool call {number}: its arguments are no JSON object")
        identity = {"id": call["id"]} if "id" in call else {}
        function = {"name": function["name"], "arguments": arguments}
        checked.append({**identity, "type": "function", "function": function})
    return checked


def read_value(text: str, schema: Any = None) -> Any:
    """The value of a parameter; `ToolCallParser` says how."""
    allowed = _allowed_types(schema)
    try:
        value = parse_json(text)
    except ValueError:
        return text
    kind = JSON_TYPES[type(value)]
    fits = kind in allowed and kind != "string"
    return text if "string" in allowed and not fits else value


def parse_json(text: str) -> Any:
    """Strict JSON: ValueError on NaN, Infinity, numbers that overflow, and bottomless nesting."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no JSON number")
    return value


def _property(schema: Any, key: str) -> Any:
    schema = schema or {}
    return schema.get("properties", {}).get(key, schema.get("additionalProperties"))


def _allowed_types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows; all of them where it does not say."""
    match schema:
        case {"type": str(name)}:
            types = frozenset([name])
        case {"type": [*names]}:
            types = ANY.intersection(name for name in names if isinstance(name, str))
        case {"enum": [*values]}:
            types = frozenset(JSON_TYPES.get(type(value), "") for value in values)
        case {"const": value}:
            types = frozenset([JSON_TYPES.get(type(value), "")])
        case {"anyOf": [*options]} | {"oneOf": [*options]}:
            types = frozenset().union(*map(_allowed_types, options))
        case {"allOf": [*options]}:
            types = ANY.intersection(*map(_allowed_types, options))
        case _:
            types = ANY
    if "number" in types:
        types |= {"integer"}
    return types & ANY or ANY


def _begins_tag(text: str) -> bool:
    """Whether `text`, which starts with its only "<", could become a tag that it is not yet."""
    if text.endswith(">"):
        return False
    return any(tag.startswith(text) for tag in TAGS) or bool(OPEN_NAME.fullmatch(text))


def _tokens(text: str) -> list[Token]:
    tokens = []
    for index, source in enumerate(WHOLE_TAG.split(text)):
        if index % 2:
            tag, equals, name = source.partition("=")
            tokens.append(Token(source, tag + equals, name.removesuffix(">").strip()))
        elif source:
            tokens.append(Token(source))
    return tokens
