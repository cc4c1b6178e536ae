"""Chat templates: the same text as transformers renders, and nothing else for a hostile one."""

# ruff: noqa: E501 -- templates stay on the lines they are written on

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from relax_llm.errors import TokenizerError
from relax_llm.text import render_chat, sandbox

if TYPE_CHECKING:
    from collections.abc import Mapping

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama-2": """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}
{% set loop_messages = messages %}
{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}
{% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}""",
    "llama-3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(first=true, count=0) %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if ns.first %}{{- 'Today: ' ~ date_string ~ '\n' }}{%- set ns.first = false %}{%- endif %}
    {%- if tools is not none and loop.last %}
        {%- for t in tools %}
            {{- t | tojson(indent=4) }}
            {{- "\n\n" }}
        {%- endfor %}
    {%- endif %}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
{{- ns.count }}""",
    "mistral": """{%- if messages[0]["role"] == "system" -%}
    {%- set system = messages[0]["content"] -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set rest = messages -%}
{%- endif -%}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == rest[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "generation": """{% for message in messages %}
{% if message.role == 'assistant' %}
  {% generation %}{{ message.content }}{{ eos_token }}
  {% endgeneration %}
{% else %}
<|{{ message.role }}|>{{ message.content }}
{% endif %}
{% endfor %}""",
    "loop-controls": """{% macro say(role, text='-') %}{{ role|upper }}: {{ text|replace('\n', ' ')|trim }}
{% endmacro %}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{{ say(message.role, message['content']) }}
{%- if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ range(3)|join(',') }} {{ dict(a=1)|tojson }} {{ "%s=%d"|format('x', 3) }} {{ "{}-{}".format(1, 'y') }}
{{ messages|map(attribute='role')|unique|list|tojson }} {{ 2 ** 10 }} {{ 'ab' * 3 }} {{ [1] + [2] }} {{ 7 % 4 }}
{{ messages|length ~ ' ' ~ none ~ true }}{{ 'a\n  b'|indent(4, true) }}""",
    "json": "{{ messages|tojson }}{{ tools|tojson(indent=2, sort_keys=true) }}{{ '<é\"\\'&>'|tojson(ensure_ascii=true) }}",
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": 'Hi, what\'s 2 < 3 & "é"?'}],
    "three": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " 你好\n<|im_end|> "},
        {"role": "assistant", "content": "  Hello! \n"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    "long": [{"role": ("user", "assistant")[i % 2], "content": f"message {i}\n\n\tline"} for i in range(9)],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "adds", "parameters": {"a": {"type": "int"}}},
    }
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no-tools", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers(
    template: str, conversation: str, tools: list[Mapping[str, Any]] | None, prompt: bool
) -> None:
    messages = CONVERSATIONS[conversation]
    expected, _ = render_jinja_template(
        [messages],
        chat_template=TEMPLATES[template],
        tools=tools,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    ours = render_chat(
        TEMPLATES[template],
        messages,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
        tools=tools,
    )
    assert ours == expected[0]


def render(template: str, **variables: Any) -> str:
    return render_chat(template, [{"role": "user", "content": "x"}], add_generation_prompt=True, **variables)


def test_a_token_the_model_does_not_have_is_not_defined() -> None:
    assert render("[{{ bos_token }}{{ eos_token is defined }}]", eos_token="e") == "[True]"


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(TokenizerError, match="refuses this conversation: only system messages, please"):
        render("{{ raise_exception('only system messages, please') }}")


@pytest.mark.parametrize(
    ("template", "line"),
    [("a\n\n{% if %}", 3), ("{% for x in messages %}\n{{ x }", 2), ("\n{{ 'x' | nofilter }}", 2)],
)
def test_a_syntax_error_names_its_line(template: str, line: int) -> None:
    with pytest.raises(TokenizerError, match=rf"syntax error in line {line}: "):
        render(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nothing.at.all }}", r"was not given: 'nothing' is undefined\."),
        ("{{ 1 / 0 }}", r"ZeroDivisionError: division by zero\."),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
    ],
)
def test_a_failing_template_says_how(template: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        render(template)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": object()}], "'messages' holds a object"),
        ([{"role": "user", "content": sys}], "'messages' holds a module"),
        ([{"role": "user", "content": b"bytes"}], "'messages' holds a bytes"),
    ],
)
def test_messages_are_plain_data(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        render_chat("{{ messages }}", messages, add_generation_prompt=False)
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested]
    with pytest.raises(TokenizerError, match="'extra' is nested more than 64 deep"):
        render("", extra=nested)


def test_a_template_cannot_change_the_messages() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": ["a"]}]
    for template in (
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].content.pop() }}",
    ):
        with pytest.raises(TokenizerError, match="no template may do"):
            render_chat(template, messages, add_generation_prompt=False)
    assert messages == [{"role": "user", "content": ["a"]}]


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ()|attr('__class__')|attr('__base__')|attr('__subclasses__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ dict.__class__.__init__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{m.__class__}'.format_map({'m': ''}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{% set ns = namespace(__class__='x') %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}",
    "{{ namespace({'__init__': 1}) }}",
    "{{ messages.__reduce__() }}",
    "{{ (messages|groupby('role'))[0].__class__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ joiner.__init__ }}",
    "{% generation %}{{ caller.__class__ }}{% endgeneration %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_nothing_of_python_shows(template: str) -> None:
    """Refused, or empty as a name that does not exist: never a class, function or module."""
    try:
        text = render(template)
    except TokenizerError:
        return
    assert text.strip("[]()'") == "" or text == "[Undefined]"


BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "product": "{% set n = namespace(v=9) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "repeat text": "{{ 'a' * 10 ** 10 }}",
    "repeat list": "{{ [1] * 10 ** 10 }}",
    "double text": "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
    "double by ~": "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
    "double list": "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
    "keep many": "{% set n = namespace(v=[]) %}{% for i in range(999) %}{% set n.v = n.v + ['a' * 4000000 ~ i] %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "wide calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for i in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "center": "{{ 'a'|center(10 ** 10) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10 ** 8) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 10, 1) }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "format method": "{{ '{:10000000000}'.format(1) }}",
    "strftime": "{{ strftime_now('%1000000000Y') }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "join": "{{ ('b' * 1000000).join(['a'] * 1000000) }}",
    "join filter": "{{ (['a'] * 1000000)|join('b' * 1000000) }}",
    "indent": "{{ ('\\n' * 100000)|indent('x' * 100000) }}",
    "tojson": "{{ [1]|tojson(indent=10 ** 10) }}",
    "batch": "{{ [1]|batch(10 ** 10, 0)|list }}",
    "slice": "{{ [1]|slice(10 ** 10)|list }}",
    "output": "{% set a = 'x' * 1000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "macro output": "{% set a = 'x' * 1000000 %}{% macro f() %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endmacro %}{{ f() }}",
    "filler": "{{ lipsum(10 ** 6) }}",
    "long template": "x" * 1_000_001,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_work_and_memory_are_bounded(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(TokenizerError):
        render(BOMBS[name])
    assert time.process_time() - start < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single slow step after another, each within its own bounds."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(TokenizerError, match=r"takes more than 0\.05 seconds"):
        render("{% for i in range(99999) %}{% set a = range(99999)|sum %}{% endfor %}")


def test_a_long_conversation_is_within_the_bounds() -> None:
    """A million characters in two thousand messages, as a model with a long context is given them."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 100} for i in range(2000)]
    text = render_chat(CHATML, messages, add_generation_prompt=True)
    assert len(text) > 1_000_000
