"""Renders chat templates with Jinja2, set up as transformers does, into chat_templates.json.

    pip install jinja2==3.1.6 gguf==0.19.0
    python make_chat_templates.py SmolLM2-135M-Instruct.gguf Qwen2.5-Coder-0.5B-Instruct.gguf

The set-up follows transformers.utils.chat_template_utils._compile_jinja_template; only the mask of
`{% generation %}` blocks is left out, their content is printed.
"""

import json
import sys
from pathlib import Path

import jinja2
from gguf import GGUFReader
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template, **variables):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(**variables)


def text_of(field):
    return bytes(field.parts[field.data[0]]).decode("utf-8")


def from_gguf(path):
    reader = GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"]
    special = {}
    for name in ("bos", "eos"):
        field = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            token = int(field.parts[field.data[0]][0])
            special[f"{name}_token"] = bytes(tokens.parts[tokens.data[token]]).decode("utf-8")
    return text_of(reader.fields["tokenizer.chat_template"]), special


SYSTEM = {"role": "system", "content": "Answer in one word."}
USER = {"role": "user", "content": "What is the capital of France?"}
ASSISTANT = {"role": "assistant", "content": "Paris."}
CONVERSATIONS = {
    "user": [USER],
    "system and user": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "  And of Japan?\n"}],
    "other scripts": [{"role": "user", "content": "你好 <|im_end|> 'quoted' \"twice\" & <b>ß</b> 🦀"}],
    "assistant last": [USER, ASSISTANT],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city; it's < \"fine\" & über",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
    ],
}
RESULT = {"role": "tool", "content": '{"sky": "blue"}'}

VALUE = {"b": [1, 2.0, 1e16, 1e-05, 0.1, True, None], "a": {}, "é": [], "q": "it's \"x\" \\ \n < > & 🦀"}
PYTHON = {
    "json": "{{ value | tojson }}",
    "json indented": "{{ value | tojson(indent=4) }}",
    "json sorted": "{{ value | tojson(sort_keys=True) }}",
    "json ascii": "{{ value | tojson(ensure_ascii=True) }}",
    "json separators": "{{ value | tojson(separators=(',', ':')) }}",
    "json indented with separators": "{{ value | tojson(indent=1, separators=('; ', ' = ')) }}",
    "values": "{{ none }} {{ true }} {{ false }} {{ 1 }} {{ 1.0 }} {{ 1e16 }} {{ missing }}|{{ value }}",
    "string filter": "{{ (true | string) + (1.5 | string) + (none | string) }}",
    "loop controls": "{% for x in range(9) %}{% if x == 2 %}{% continue %}{% endif %}"
    "{% if x == 5 %}{% break %}{% endif %}{{ x }}{{ loop.index }}{% endfor %}",
    "generation": "a{% generation %}\nb{{ 1 }}\n{%- endgeneration -%}\n c",
    "methods": "{{ ' x '.strip() }}{{ 'a,b'.split(',')[-1] }}{{ 'abc'.startswith('ab') }}{{ 'aXb'.upper().lower() }}"
    "{{ value.get('missing', 'default') }}{% for k, v in value.items() %}{{ k }}{% endfor %}{{ 'abcdef'[1:-1][::-1] }}",
    "whitespace": "  {% if true %}\n    x\n  {% endif %}\ny\n{# comment #}\nz\n",
    "namespace and macro": "{% set n = namespace(found=false) %}{% macro m(x, y='d') %}<{{ x }}{{ y }}>{% endmacro %}"
    "{% for x in [1, 2] %}{% if x is divisibleby 2 %}{% set n.found = x %}{% endif %}{% endfor %}{{ m(n.found) }}",
    "tests and filters": "{{ 'content' in value }}{{ value is mapping }}{{ 'x' is string }}{{ [3,1,2] | sort | join('-') }}"
    "{{ [1,2,3] | length }}{{ ' a' | trim }}{{ {'a': 1} | items | list | length }}{{ [{'k': 1}] | map(attribute='k') | list }}",
}


def main():
    cases = []
    templates = {}
    for name, path in zip(["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"], sys.argv[1:]):
        template, special = from_gguf(path)
        templates[name] = {"template": template, "special_tokens": special}
        for title, messages in CONVERSATIONS.items():
            for add_generation_prompt in (False, True):
                inputs = {"messages": messages, "tools": None, "add_generation_prompt": add_generation_prompt}
                cases.append({"template": name, "title": title, "inputs": inputs})
        tools = {"messages": [USER, CALL, RESULT], "tools": [TOOL], "add_generation_prompt": True}
        cases.append({"template": name, "title": "tools", "inputs": tools})
    for case in cases:
        entry = templates[case["template"]]
        variables = {**entry["special_tokens"], **case["inputs"], "documents": None}
        case["expected"] = render(entry["template"], **variables)
    python = [
        {"title": title, "template": template, "expected": render(template, value=VALUE)}
        for title, template in PYTHON.items()
    ]
    golden = {"templates": templates, "cases": cases, "value": VALUE, "python": python}
    output = Path(__file__).with_name("chat_templates.json")
    output.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
