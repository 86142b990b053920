"""Which of vLLM's parsers reads a model's calls of tools and its thoughts, by the family of its chat template.

The family is told by the markers that a template writes around a call, because a fine-tuned model keeps its template,
whatever it is called. The parsers' names are those of vLLM 0.32.
"""

from dataclasses import dataclass
from typing import Literal

# What a deployment may name: the parsers that vLLM brings along. Any other name would be one that a plugin registers,
# and a plugin is a file of code.
ToolParser = Literal[
    "auto",
    "none",
    "apertus",
    "cohere_command3",
    "cohere_command4",
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "deepseek_v4",
    "deepseek_v41",
    "dots",
    "ernie45",
    "functiongemma",
    "gemma4",
    "gigachat3",
    "glm45",
    "glm47",
    "granite",
    "granite-20b-fc",
    "granite4",
    "hermes",
    "hf",
    "hunyuan_a13b",
    "hy_v3",
    "hy_v4",
    "inkling",
    "internlm",
    "jamba",
    "k2_horizon",
    "kimi_k2",
    "kimi_k3",
    "lfm2",
    "ling3",
    "llama3_json",
    "llama4_json",
    "llama4_pythonic",
    "longcat",
    "mimo",
    "minicpm5",
    "minimax_m2",
    "minimax_m3",
    "mistral",
    "muse_glimmer",
    "olmo3",
    "openai",
    "phi4_mini_json",
    "plamo3",
    "poolside_v1",
    "pythonic",
    "qwen3_coder",
    "qwen3_json",
    "qwen3_xml",
    "seed_oss",
    "step3",
    "step3p5",
    "xlam",
]
"""Of ``--tool-call-parser``; auto = by the family of the chat template."""
ReasoningParser = Literal[
    "auto",
    "none",
    "cohere_command3",
    "cohere_command4",
    "deepseek_r1",
    "deepseek_v3",
    "deepseek_v4",
    "deepseek_v41",
    "ernie45",
    "gemma4",
    "glm45",
    "glm47",
    "granite",
    "granite_thinking_parser",
    "hf",
    "holo2",
    "hunyuan_a13b",
    "hy_v3",
    "hy_v4",
    "inkling",
    "k2_horizon",
    "kimi_k2",
    "kimi_k3",
    "ling3",
    "mimo",
    "minicpmv",
    "minimax_m2",
    "minimax_m2_append_think",
    "minimax_m3",
    "mistral",
    "muse_glimmer",
    "nemotron_v3",
    "olmo3",
    "openai_gptoss",
    "plamo3",
    "poolside_v1",
    "qwen3",
    "seed_oss",
    "step3",
    "step3p5",
]
"""Of ``--reasoning-parser``; auto = by the chat template."""


@dataclass(frozen=True)
class Parsers:
    """Names for vLLM's ``--tool-call-parser`` and ``--reasoning-parser``; None: there is none."""

    tool: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class _Family:
    name: str
    has: tuple[str, ...]
    parser: str
    reasoning: str | None = None


# The first that fits is taken: those with more markers stand before those that share one of them.
_FAMILIES = (
    _Family("gpt-oss", ("<|channel|>", "<|message|>"), "openai", "openai_gptoss"),
    _Family("kimi k2", ("<|tool_calls_section_begin|>",), "kimi_k2"),
    _Family("deepseek v3, r1", ("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    _Family("deepseek v3.1", ("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    _Family("minimax m2", ("<minimax:tool_call>",), "minimax_m2"),
    _Family("seed oss", ("<seed:tool_call>",), "seed_oss"),
    _Family("glm 4.5 and later", ("<tool_call>", "<arg_key>"), "glm45"),
    _Family("qwen3 coder", ("<tool_call>", "<function="), "qwen3_coder"),
    _Family("lfm2", ("<|tool_call_start|>",), "lfm2"),
    _Family("internlm 2.5", ("<|action_start|>", "<|plugin|>"), "internlm"),
    _Family("gemma 4", ("<|tool_call>",), "gemma4"),
    _Family("function gemma", ("<start_function_call>",), "functiongemma"),
    _Family("granite 3", ("<|tool_call|>", "<|start_of_role|>"), "granite"),
    _Family("granite 4", ("<tool_call>", "<|start_of_role|>"), "granite4"),
    _Family("mistral", ("[TOOL_CALLS]",), "mistral"),
    _Family("olmo 3", ("<function_calls>",), "olmo3"),
    _Family("llama 3", ("<|python_tag|>", '"parameters"'), "llama3_json"),
    _Family("jamba", ("<tool_calls>", "<|bom|>"), "jamba"),
    _Family("hermes, qwen 2.5, qwen 3", ("<tool_call>", '"name"'), "hermes"),
)
# Where the prompt itself opens the thought, the answer begins inside of it. A template that only may open one is left
# without a parser: those for it take all of an answer for a thought that was never closed, and a model that was tuned
# not to think would answer nothing.
_OPENED = ("<think>\\n' }}", "<think>\\n'}}", '<think>\\n" }}', '<think>\\n"}}', "<think>\\n') }}", "<think>\\n')}}")


def for_template(template: str | None) -> Parsers:
    """The parsers for a chat template, as its text is; none where no family is known."""
    if not template:
        return Parsers()
    family = next((family for family in _FAMILIES if all(marker in template for marker in family.has)), None)
    reasoning = family.reasoning if family else None
    if reasoning is None and _opens_thought(template):
        reasoning = "deepseek_r1"
    return Parsers(family.parser if family else None, reasoning)


def chosen(template: str | None, tool: str = "auto", reasoning: str = "auto") -> Parsers:
    """The parsers that an engine is started with: those that were named, else those for its model's chat template."""
    found = for_template(template)
    return Parsers(_picked(tool, found.tool), _picked(reasoning, found.reasoning))


def _picked(asked: str, found: str | None) -> str | None:
    return found if asked == "auto" else None if asked == "none" else asked


def _opens_thought(template: str) -> bool:
    """Whether the prompt for an answer always ends with an open thought."""
    prompt = template.rpartition("add_generation_prompt")[2]
    return "enable_thinking" not in template and any(opened in prompt for opened in _OPENED)
