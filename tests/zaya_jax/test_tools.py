"""Tool calls: found in text however it arrives, read by schema, rendered so that they return."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zaya_jax.config import ZayaConfig
from zaya_jax.errors import InputError
from zaya_jax.loading import NANO
from zaya_jax.text.chat import ChatTemplate, split_thinking
from zaya_jax.text.tokenizer import Tokenizer
from zaya_jax.text.tools import ToolCall, ToolCallParser, parse_tool_calls

SCHEMAS = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "object": {"type": "object"},
    "array": {"type": "array", "items": {"type": "string"}},
    "null": {"type": "null"},
    "types": {"type": ["integer", "string"]},
    "optional": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "one_of": {"oneOf": [{"type": "number"}, {"type": "boolean"}]},
    "all_of": {"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]},
    "words": {"enum": ["on", "off", "1"]},
    "numbers": {"enum": [1, 2]},
    "constant": {"const": "7"},
    "reference": {"$ref": "#/$defs/Colour"},
    "odd": {"type": "whatever"},
    "anything": True,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "Does <f> & more.",
            "parameters": {
                "type": "object",
                "properties": SCHEMAS,
                "additionalProperties": {"type": "string"},
            },
        },
    },
    {"name": "bare", "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}},
    {"name": "plain"},
]


def parameter(value, key="x"):
    return f"<parameter={key}>\n{value}\n</parameter>\n"


def function(*parameters, name="g"):
    return f"<function={name}>\n{''.join(parameters)}</function>\n"


def element(*functions):
    return f"<zyphra_tool_call>\n{''.join(functions)}</zyphra_tool_call>"


def g(**arguments):
    return ToolCall("g", arguments)


ONE = element(function(parameter("1")))
END = "\n</zyphra_tool_call>"
OPEN = ONE.removesuffix(END)


def case(name, response, text, *calls):
    return pytest.param(response, text, list(calls), id=name)


@pytest.mark.parametrize(
    ("response", "text", "calls"),
    [
        case("nothing", "", ""),
        case("only text", "a < b && c > d\n", "a < b && c > d\n"),
        case("one call", ONE, "", g(x=1)),
        case("text around", f"Look:\n{ONE}\nDone.", "Look:\n\nDone.", g(x=1)),
        case("calls in a row", f"{ONE}\n{ONE}", "\n", g(x=1), g(x=1)),
        case("calls that touch", ONE + ONE, "", g(x=1), g(x=1)),
        case("text between calls", f"{ONE} and {ONE}", " and ", g(x=1), g(x=1)),
        case(
            "several functions in one element",
            element(function(parameter(1)), function(parameter(2), name="h")),
            "",
            g(x=1),
            ToolCall("h", {"x": 2}),
        ),
        case("no parameters", element(function()), "", g()),
        case(
            "several parameters",
            element(function(parameter(1), parameter(2, "y"))),
            "",
            g(x=1, y=2),
        ),
        case("duplicate parameters", element(function(parameter(1), parameter(2))), "", g(x=2)),
        case("without whitespace", re.sub(r"\s", "", ONE), "", g(x=1)),
        case("with much whitespace", re.sub(r"\s", "\r\n\t ", ONE), "", g(x=1)),
        case(
            "spaces around names",
            "<zyphra_tool_call><function= g ><parameter= x >1</parameter></function>",
            "",
            g(x=1),
        ),
        case(
            "names of all kinds",
            element(function(parameter(1, "größe in cm"), name="мой.tool-2")),
            "",
            ToolCall("мой.tool-2", {"größe in cm": 1}),
        ),
        case("open element at the end", OPEN, "", g(x=1)),
        case("element cut in its end", OPEN + END[:-3], END[:-3], g(x=1)),
        case("open element before text", f"{OPEN} Done.", " Done.", g(x=1)),
        case("open element before a call", f"{OPEN}\n{ONE}", "\n", g(x=1), g(x=1)),
        case("open function", f"{ONE.replace('</function>', '')}!", "!", g(x=1)),
        case("open function without parameters", element("<function=g>"), "", g()),
        case("text inside an element", f"{OPEN}.{END}", f".{END}", g(x=1)),
        case(
            "a second function that is broken",
            element(function(), "<function=h>oops</function>"),
            "\n<function=h>oops</function></zyphra_tool_call>",
            g(),
        ),
        case("reasoning", f"<think>{ONE}</think>{ONE}", f"<think>{ONE}</think>", g(x=1)),
        case("reasoning again", f"{ONE}<think>{ONE}</think>", f"<think>{ONE}</think>", g(x=1)),
        case("open reasoning", f"<think>{ONE}", f"<think>{ONE}"),
        case(
            "reasoning inside an element",
            f"<zyphra_tool_call><think>{ONE}",
            f"<zyphra_tool_call><think>{ONE}",
        ),
        case("stray end of reasoning", f"</think>{ONE}", "</think>", g(x=1)),
    ],
)
def test_calls_are_separated_from_text(response, text, calls):
    assert parse_tool_calls(response) == (text, calls)


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("</zyphra_tool_call></function></parameter>", id="stray closing tags"),
        pytest.param(element(), id="empty element"),
        pytest.param(function(parameter(1)), id="function outside an element"),
        pytest.param("<zyphra_tool_call>", id="cut after the element"),
        pytest.param("<zyphra_tool_c", id="cut inside a tag"),
        pytest.param("<zyphra_tool_call>\n<function=g", id="cut inside a name"),
        pytest.param("<zyphra_tool_call>\n<function=g>\n", id="cut after a name"),
        pytest.param(
            "<zyphra_tool_call>\n<function=g>\n<parameter=x>\n1 <", id="cut inside a value"
        ),
        pytest.param(ONE.partition("</parameter>")[0], id="cut after a value"),
        pytest.param(ONE.partition("</function>")[0], id="cut after a parameter"),
        pytest.param(ONE.replace("<function=g>\n", ""), id="parameter outside a function"),
        pytest.param(ONE.replace("=g>", ">"), id="function without a name"),
        pytest.param(ONE.replace("=g>", "= >"), id="function with a blank name"),
        pytest.param(ONE.replace("=g>", "=g\n>"), id="function name over two lines"),
        pytest.param(element('{"name": "g", "arguments": {}}'), id="JSON in an element"),
        pytest.param(ONE.replace("zyphra_", ""), id="another model's tags"),
    ],
)
def test_what_is_no_whole_call_is_text_to_the_letter(response):
    assert parse_tool_calls(response) == (response, [])


def test_a_call_after_a_broken_one_is_found():
    assert parse_tool_calls("<zyphra_tool_call>\n" + ONE) == ("<zyphra_tool_call>\n", [g(x=1)])


def test_a_reasoning_block_that_the_prompt_opened_is_text():
    response = f"{ONE}</think>{ONE}"
    assert parse_tool_calls(response, thinking=True) == (f"{ONE}</think>", [g(x=1)])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a\nb\n\nc", id="several lines"),
        pytest.param("\na\n", id="blank lines around"),
        pytest.param("  a\t", id="spaces around"),
        pytest.param("\n", id="only a newline"),
        pytest.param("", id="empty"),
        pytest.param("a\r", id="carriage return"),
        pytest.param("if a < b && b > c: &lt;", id="angles and ampersands"),
        pytest.param("</para", id="part of a closing tag"),
        pytest.param("a </parameter> b", id="closing tag inside a line"),
        pytest.param("a\n</parameter>", id="closing tag at the end"),
        pytest.param("</parameter>\n</parameter>\n", id="closing tags one after another"),
        pytest.param("<parameter=x>\n1", id="opening tag"),
        pytest.param("<function=f>\n</function>", id="function"),
        pytest.param("<zyphra_tool_call>\n</zyphra_tool_call>", id="element"),
        pytest.param("<think>\n</think>", id="reasoning tags"),
        pytest.param("größer 🙂 \u2028 \x00", id="unicode"),
        pytest.param('{"a": 1}', id="like an object"),
        pytest.param("123", id="like a number"),
        pytest.param("true", id="like a boolean"),
        pytest.param("null", id="like null"),
        pytest.param('"quoted"', id="like a JSON string"),
    ],
)
def test_strings_are_verbatim(text):
    response = element(function(parameter(text, "string"), parameter(text, "other"), name="f"))
    call = ToolCall("f", {"string": text, "other": text})
    assert parse_tool_calls(response, TOOLS) == ("", [call])


def test_a_value_on_the_line_of_its_tags_loses_nothing():
    response = "<zyphra_tool_call><function=bare><parameter=key> a\nb </parameter></function>"
    assert parse_tool_calls(response, TOOLS) == ("", [ToolCall("bare", {"key": " a\nb "})])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("integer", "42", 42),
        ("integer", "-3", -3),
        ("integer", " 4 ", 4),
        ("integer", "many", "many"),
        ("integer", '"5"', "5"),
        ("integer", "", ""),
        ("integer", "9" * 5000, "9" * 5000),
        ("number", "1", 1),
        ("number", "1e5", 1e5),
        ("number", "NaN", "NaN"),
        ("number", "-Infinity", "-Infinity"),
        ("number", "1e999", "1e999"),
        ("boolean", "true", True),
        ("boolean", "True", "True"),
        ("boolean", "1", 1),
        ("null", "null", None),
        ("object", '{"a": {"b": [1, "é", null]}}', {"a": {"b": [1, "é", None]}}),
        ("object", '{"a": NaN}', '{"a": NaN}'),
        ("object", "{'a': 1}", "{'a': 1}"),
        ("array", '[\n "a",\n "</parameter>"\n]', ["a", "</parameter>"]),
        ("array", "[" * 100_000, "[" * 100_000),
        ("types", "1", 1),
        ("types", "true", "true"),
        ("types", "one", "one"),
        ("optional", "null", None),
        ("optional", "123", "123"),
        ("optional", '"123"', '"123"'),
        ("one_of", "1.5", 1.5),
        ("one_of", "false", False),
        ("all_of", "1", "1"),
        ("words", "on", "on"),
        ("words", "1", "1"),
        ("numbers", "1", 1),
        ("constant", "7", "7"),
        ("reference", "7", 7),
        ("odd", "7", 7),
        ("anything", "[7]", [7]),
        ("anything", '"7"', '"7"'),
    ],
)
def test_values_are_read_by_their_schema(key, text, value):
    _, (call,) = parse_tool_calls(element(function(parameter(text, key), name="f")), TOOLS)
    read = call.arguments[key]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("name", ["plain", "unknown"])
def test_without_a_schema_json_is_read_unless_it_is_a_string(name):
    texts = ["1e5", "-3", "[]", "null", '"a"', "a", "NaN", ""]
    values = [1e5, -3, [], None, '"a"', "a", "NaN", ""]
    response = element(function(*(parameter(t, f"k{i}") for i, t in enumerate(texts)), name=name))
    _, (call,) = parse_tool_calls(response, TOOLS)
    assert list(call.arguments.values()) == values and call.name == name


FRAGMENTS = [
    "<zyphra_tool_call>",
    "</zyphra_tool_call>",
    "<function=f>",
    "</function>",
    "<parameter=string>",
    "<parameter= integer >",
    "</parameter>",
    "<think>",
    "</think>",
    "<function=",
    "</para",
    "<",
    ">",
    "\n",
    "1",
    ONE,
    function(parameter("1", "string"), name="f"),
]
responses = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)


def parse_pieces(pieces):
    """The events, with texts joined where the pieces cut them."""
    parser = ToolCallParser(TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    joined = []
    for event in events:
        if joined and isinstance(event, str) and isinstance(joined[-1], str):
            joined[-1] += event
        else:
            joined.append(event)
    return joined


@given(response=responses, cuts=st.lists(st.integers(0, 300)))
def test_every_split_gives_the_same_and_loses_nothing(response, cuts):
    whole = parse_pieces([response])
    bounds = sorted({0, len(response), *(cut for cut in cuts if cut < len(response))})
    assert parse_pieces([response[a:b] for a, b in pairwise(bounds)]) == whole
    assert parse_pieces(response) == whole  # one character at a time
    sources = [event if isinstance(event, str) else event.source for event in whole]
    assert "".join(sources) == response


def test_nothing_is_held_back_without_need():
    parser = ToolCallParser()
    assert parser.feed("a <") == ["a "]
    assert parser.feed("b> <function=") == ["<b> "]
    assert parser.feed("\n<zyphra_tool_call>") == ["<function=\n"]
    assert parser.feed("no") == ["<zyphra_tool_call>no"]
    assert parser.feed(ONE[:-1]) == []
    assert parser.feed(ONE[-1]) == [g(x=1)]
    assert parser.feed("<thin") == []
    assert parser.finish() == ["<thin"]


def test_long_values_are_read_in_linear_time():
    """Many single characters, with tags in every line."""
    value = "a < b <parameter=x> </parameter> \n" * 5_000
    response = element(function(parameter(value, "string"), name="f"))
    assert parse_pieces(response) == [ToolCall("f", {"string": value})]


names = st.from_regex(r"[A-Za-z_][\w.-]{0,9}", fullmatch=True)
texts = st.text(max_size=5) | st.sampled_from(FRAGMENTS)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
lists = st.lists(texts | scalars, max_size=3)
json_values = scalars | lists | st.dictionaries(texts, scalars | lists, max_size=3)
arguments = st.dictionaries(names, texts | json_values, max_size=3)
calls = st.lists(st.builds(ToolCall, names, arguments), min_size=1, max_size=3)


def tools_for(calls):
    """Functions whose schemas say which of these arguments are strings."""

    def schema(value):
        return {"type": "string"} if isinstance(value, str) else {}

    return [
        {
            "name": call.name,
            "parameters": {"properties": {k: schema(v) for k, v in call.arguments.items()}},
        }
        for call in calls
    ]


def render(messages, **values):
    return ChatTemplate(None, {"bos_token": "<bos>"}).render(messages, **values)


def message(*calls, **fields):
    tool_calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return {"role": "assistant", "tool_calls": tool_calls, **fields}


@given(calls=calls, content=st.none() | st.text(alphabet="ab \n<&>"))
def test_rendered_calls_parse_back_under_their_schema(calls, content):
    assume(len({call.name for call in calls}) == len(calls))
    written = json.dumps([call.arguments for call in calls])
    assume(not re.search(r"</parameter>(\\n|\s)*<[p/]", written))  # what no value can hold
    prompt = render([message(*calls, content=content)])
    start, end = "<bos><|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\n"
    answer = prompt.removeprefix(start).removesuffix(end)
    text, parsed = parse_tool_calls(answer, tools_for(calls))
    assert parsed == calls
    assert text.strip() == (content or "").strip()


def test_chatml_shows_tools_calls_and_results():
    tools = [{"name": "add", "description": "a + b, <é>", "parameters": {"type": "object"}}]
    first = ToolCall("add", {"a": 1, "b": [None], "unit": "m\ns"})
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        message(first, ToolCall("now", {}), content="Let me see."),
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "noon"},
        message(ToolCall("now", {}), content=None),
        {"role": "tool", "content": "noon"},
    ]
    text = """\
<bos><|im_start|>system
Be brief.

# Tools

These functions can be called:

[{"name": "add", "description": "a + b, <é>", "parameters": {"type": "object"}}]

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
<|im_start|>user
1 + 2?<|im_end|>
<|im_start|>assistant
Let me see.
<zyphra_tool_call>
<function=add>
<parameter=a>
1
</parameter>
<parameter=b>
[null]
</parameter>
<parameter=unit>
m
s
</parameter>
</function>
</zyphra_tool_call>
<zyphra_tool_call>
<function=now>
</function>
</zyphra_tool_call><|im_end|>
<|im_start|>user
<zyphra_tool_response>
3
</zyphra_tool_response>
<zyphra_tool_response>
noon
</zyphra_tool_response><|im_end|>
<|im_start|>assistant
<zyphra_tool_call>
<function=now>
</function>
</zyphra_tool_call><|im_end|>
<|im_start|>user
<zyphra_tool_response>
noon
</zyphra_tool_response><|im_end|>
<|im_start|>assistant
"""
    assert render(messages, tools=tools) == text
    system = "Be brief.\n\n"
    assert render(messages[1:], tools=tools) == text.replace(system, "")
    without = render(messages)
    assert without.partition("user")[2] == text.partition("user")[2]
    assert without.startswith("<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_every_form_of_tools_and_calls_reaches_a_template_as_the_same():
    """Also no tools at all: templates test for None."""
    template = ChatTemplate("{{ tools | tojson }} {{ messages[0] | tojson }}", {})
    bare = {"name": "f", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": bare}
    call = {"name": "f", "arguments": {"x": 1}}
    same = [
        call,
        {"name": "f", "arguments": '{"x": 1}'},
        {"type": "function", "function": call},
        {"function": {"name": "f", "arguments": '{"x": 1}'}},
    ]
    seen = {
        template.render([{"role": "assistant", "tool_calls": [call]}], tools=[tool])
        for call in same
        for tool in (bare, wrapped)
    }
    assert len(seen) == 1 and json.dumps([wrapped]) in seen.pop()
    user = {"role": "user", "content": "hi", "name": "Ada"}
    assert template.render([user]) == f"null {json.dumps(user)}"


def test_the_id_of_a_call_reaches_the_template():
    template = ChatTemplate("{{ messages[0].tool_calls[0].id }}", {})
    call = {"id": "call_7", "function": {"name": "f", "arguments": None}}
    assert template.render([{"role": "assistant", "tool_calls": [call]}]) == "call_7"


def test_messages_are_left_as_they_were():
    call = {"name": "f", "arguments": '{"x": 1}'}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    render(messages, tools=TOOLS)
    assert messages == [
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}
    ]


def test_the_tokens_of_a_conversation_hold_its_tools():
    tokenizer = Tokenizer.from_folder(NANO, ZayaConfig.preset("nano"))
    messages = [{"role": "user", "content": "hi"}]
    tokens = tokenizer.encode_chat(messages, tools=TOOLS)
    assert tokenizer.decode(tokens) == tokenizer.template.render(messages, tools=TOOLS)


def test_reasoning_calls_and_answer_come_apart():
    response = f"<think>\nWhat is g?\n</think>\n\nLet me see.\n{ONE}"
    text, calls = parse_tool_calls(response)
    assert split_thinking(text) == ("What is g?", "Let me see.") and calls == [g(x=1)]


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ({"name": "f"}, "tools are not a list"),
        (["f"], "tool 0 is not a function"),
        ([{"name": "f"}, {"type": "web_search"}], "tool 1 is not a function"),
        ([{"type": "function"}], "tool 0 needs a name"),
        ([{"type": "function", "function": "f"}], "tool 0 needs a name"),
        ([{"name": "a b"}], "tool 0 needs a name without spaces"),
        (
            [{"name": "f"}, {"function": {"name": "f"}}],
            "tool 1 has the name of an earlier one, 'f'",
        ),
        ([{"name": "f", "parameters": "x"}], r"tool 0 \(f\): its parameters are no JSON schema"),
        ([{"name": "f", "parameters": {"properties": ["x"]}}], r"tool 0 \(f\): its parameters"),
    ],
)
def test_malformed_tools_are_named(tools, error):
    with pytest.raises(InputError, match=error):
        render([{"role": "user", "content": "hi"}], tools=tools)
    with pytest.raises(InputError, match=error):
        ToolCallParser(tools)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "assistant", "content": None}, "message 1 has no text content"),
        ({"role": "assistant", "tool_calls": []}, "message 1 has no text content"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f"}], "content": 1},
            "message 1 has no text",
        ),
        ({"role": "tool"}, "message 1 has no text content"),
        ({"role": "user", "tool_calls": [{"name": "f"}]}, "message 1 has tool_calls, but is not"),
        ({"role": "assistant", "tool_calls": "f"}, "message 1: tool_calls are not a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, "message 1: tool call 0 has no function name"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f"}, {"id": "x"}]},
            "message 1: tool call 1 has no function name",
        ),
        *(
            (
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]},
                "message 1: tool call 0: its arguments are no JSON object",
            )
            for arguments in ("{", "[1]", [1], 7, '{"x": NaN}')
        ),
    ],
)
def test_malformed_tool_messages_are_named(message, error):
    with pytest.raises(InputError, match=error):
        render([{"role": "user", "content": "hi"}, message])
