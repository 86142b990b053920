"""Which parser reads a model's calls: told by the markers of its chat template."""

import ast
from pathlib import Path
from typing import get_args

import pytest

from app import parsers
from app.parsers import Parsers, ReasoningParser, ToolParser, chosen, for_template
from app.settings import PROJECT_ROOT

# What each family's own template writes around a call.
WRITTEN = {
    "hermes": """<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>""",
    "qwen3_coder": "<tool_call>\n<function={{ call.name }}>\n<parameter=a>",
    "glm45": "<tool_call>{{ call.name }}<arg_key>{{ k }}</arg_key><arg_value>",
    "llama3_json": """{{- '<|python_tag|>' }}{{- '{"name": "' + call.name + '", ' }}{{- '"parameters": ' }}""",
    "mistral": "[TOOL_CALLS] [{{ calls }}]",
    "granite": "<|start_of_role|>assistant<|end_of_role|><|tool_call|>{{ calls | tojson }}",
    "granite4": """<|start_of_role|>assistant<|end_of_role|><tool_call>\n{"name": """,
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ name }}\n```json\n",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments }}",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>",
    "olmo3": "<function_calls>{{ calls }}</function_calls>",
    "openai": "<|start|>assistant<|channel|>commentary to={{ name }}<|message|>",
}


@pytest.mark.parametrize(
    "template", [None, "", "{{ messages[0].content }}", "<|im_start|>user\n{{ content }}<|im_end|>"]
)
def test_a_template_that_knows_no_tools(template: str | None) -> None:
    assert for_template(template) == Parsers()


@pytest.mark.parametrize(("parser", "template"), WRITTEN.items(), ids=list(WRITTEN))
def test_a_family_is_told_by_what_it_writes(parser: str, template: str) -> None:
    assert for_template(template).tool == parser


def test_thoughts_are_read_only_where_the_prompt_opens_them() -> None:
    may = "{%- if add_generation_prompt %}{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>' }}{% endif %}"
    must = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    assert for_template(may).reasoning is None
    assert for_template(must).reasoning == "deepseek_r1"
    assert for_template(WRITTEN["openai"]).reasoning == "openai_gptoss"


def test_every_parser_that_is_named_is_one_of_vllms() -> None:
    found = list(PROJECT_ROOT.glob(".venv-serve/lib/python3*/site-packages/vllm"))
    if not found:
        pytest.skip("there is no environment with vLLM")
    tools = registered(found[0] / "tool_parsers" / "__init__.py")
    assert {family.parser for family in parsers._FAMILIES} <= tools
    assert set(get_args(ToolParser)) == tools | {"auto", "none"}
    reasoning = {family.reasoning for family in parsers._FAMILIES if family.reasoning} | {"deepseek_r1"}
    names = registered(found[0] / "reasoning" / "__init__.py")
    assert reasoning <= names
    assert set(get_args(ReasoningParser)) == names | {"auto", "none"}


def test_one_that_is_named_takes_the_place_of_the_familys() -> None:
    template = WRITTEN["openai"]
    assert chosen(template) == for_template(template) == Parsers("openai", "openai_gptoss")
    assert chosen(template, "hermes") == Parsers("hermes", "openai_gptoss")
    assert chosen(template, "none", "none") == Parsers()
    assert chosen(None, "hermes", "qwen3") == Parsers("hermes", "qwen3")
    assert chosen(None) == Parsers()


def registered(path: Path) -> set[str]:
    """The names in a module's table, without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_TO_REGISTER"):
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no table")
