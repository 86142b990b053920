"""Chat templates in the shapes that models come with, each with a tokenizer of its kind, trained on the spot."""

import string
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["system user assistant tool model the weather in Oslo is cold, 7 degrees", "What is it? It is [1, 2].", "é ü"]

# Turns in marks; tools in the system turn, calls and results between tags, results of one step in one user turn.
QWEN = r"""
{% if tools %}
<|im_start|>system⏎{{ messages[0].content if messages[0].role == 'system' else 'Be helpful.' }}⏎<tools>
{% for tool in tools %}⏎{{ tool | tojson }}{% endfor %}⏎</tools><|im_end|>⏎
{% elif messages[0].role == 'system' %}
<|im_start|>system⏎{{ messages[0].content }}<|im_end|>⏎
{% else %}
<|im_start|>system⏎Be helpful.<|im_end|>⏎
{% endif %}
{% for m in messages %}
{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
<|im_start|>{{ m.role }}⏎{{ m.content }}<|im_end|>⏎
{% elif m.role == 'assistant' %}
<|im_start|>assistant{{ '\n' + m.content if m.content }}
{% for call in m.tool_calls %}⏎<tool_call>⏎{"name": "{{ call.function.name }}", "arguments": {{
 call.function.arguments | tojson }}}⏎</tool_call>{% endfor %}
<|im_end|>⏎
{% elif m.role == 'tool' %}
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
⏎<tool_response>⏎{{ m.content }}⏎</tool_response>
{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>⏎{% endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant⏎{% endif %}
"""

# Heads and ends of turns, contents trimmed, tools in the first user turn, one call a turn.
LLAMA3 = r"""
{{ bos_token }}
{% for m in messages %}
{% if m.tool_calls %}
{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
<|start_header_id|>assistant<|end_header_id|>⏎⏎{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{
 m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>
{% else %}
<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>⏎⏎
{% if tools and m.role == 'user' and loop.index0 <= 1 %}
Functions:{% for tool in tools %}⏎{{ tool | tojson }}{% endfor %}⏎⏎
{% endif %}
{{ m.content | trim }}<|eot_id|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>⏎⏎{% endif %}
"""

# No opening of an answer; the system text and the tools move along to the last question; ids of nine characters.
MISTRAL = r"""
{{ bos_token }}
{% set system = messages[0].content if messages[0].role == 'system' else '' %}
{% set last = namespace(user=-1) %}
{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}
{% if tools and loop.index0 == last.user %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
[INST] {{ system + '\n\n' if system and loop.index0 == last.user }}{{ m.content }}[/INST]
{% elif m.tool_calls %}
[TOOL_CALLS] [
{% for call in m.tool_calls %}
{% if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{% endfor %}]{{ eos_token }}
{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}
{% elif m.role == 'tool' %}
{% if m.tool_call_id is not defined %}{{ raise_exception('results have ids') }}{% endif %}
[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{% elif loop.index0 > 0 %}{{ raise_exception('a system turn comes first') }}
{% endif %}
{% endfor %}
"""

# The assistant is called model; user and assistant take turns, and there is nobody else.
GEMMA = r"""
{{ bos_token }}
{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}⏎{{ m.content | trim }}<end_of_turn>⏎
{% endfor %}
{% if add_generation_prompt %}<start_of_turn>model⏎{% endif %}
"""

# Any role, no tools; a system turn of its own where there is none.
SMOLLM2 = r"""
{% for m in messages %}
{% if loop.first and m.role != 'system' %}<|im_start|>system⏎You are helpful<|im_end|>⏎{% endif %}
<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>⏎
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant⏎{% endif %}
"""


class Shape(NamedTuple):
    """A family of models: its template, its tokenizer, the token that ends a turn."""

    template: str
    tokenizer: Callable[[list[str]], Tokenizer]
    specials: list[str]
    end: str
    bos: str | None = None

    def make(self, **settings: Any) -> Any:
        """The tokenizer with its template."""
        made = PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer(self.specials), bos_token=self.bos, eos_token=self.end, **settings
        )
        # Written over several lines for people; a line that ends in the conversation is marked.
        made.chat_template = self.template.strip().replace("\n", "").replace("⏎", "{{ '\\n' }}")
        return made


def byte_level(specials: list[str]) -> Tokenizer:
    """As of Qwen, Llama 3, SmolLM2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 2, trainer)
    return core


def with_spaces(specials: list[str]) -> Tokenizer:
    """As of Llama 2 and Mistral: a text of its own begins with a space, which is a letter like others."""
    core = _spaced(specials)
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return core


def without_spaces(specials: list[str]) -> Tokenizer:
    """As of Gemma: a space is a letter like others, and none is put before a text."""
    core = _spaced(specials)
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return core


def _spaced(specials: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    letters = sorted({letter for text in TEXTS for letter in text} | {*string.printable, "▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *specials], initial_alphabet=letters, show_progress=False
    )
    core.train_from_iterator([text.replace(" ", "▁") for text in TEXTS] * 2, trainer)
    return core


MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BRACKETS = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
SHAPES = {
    "qwen2": Shape(QWEN, byte_level, [*MARKS, "<tool_call>", "</tool_call>"], "<|im_end|>"),
    "llama3": Shape(LLAMA3, byte_level, HEADS, "<|eot_id|>", "<|begin_of_text|>"),
    "mistral": Shape(MISTRAL, with_spaces, [*BRACKETS, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], "</s>", "<s>"),
    "gemma": Shape(GEMMA, without_spaces, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<bos>"),
    "smollm2": Shape(SMOLLM2, byte_level, MARKS, "<|im_end|>"),
}
