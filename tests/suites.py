"""Suites of ours in lm-evaluation-harness's form: its own need data that have to be fetched."""

import json
from pathlib import Path

from tests.workers.conftest import conversation

_SCORED = """\
task: spelling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_WRITTEN = """\
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_suites(root: Path) -> Path:
    """``spelling``: which of three answers is made of numbers. ``writing``: the answer itself. 24 documents each."""
    rows = root / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(200, 224):
            right = conversation(number)[-1]["content"]
            first = right.split()[0]
            wrong = [f"{first} the number", f"{first} in words"]  # as many tokens as the right one
            turns = "".join(
                f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in conversation(number)[:-1]
            )
            row = {"question": f"{turns}<|im_start|>assistant\n", "choices": [*wrong, right], "gold": 2}
            file.write(json.dumps({**row, "answer": right}) + "\n")
    (root / "spelling.yaml").write_text(_SCORED.format(rows=rows))
    (root / "writing.yaml").write_text(_WRITTEN.format(rows=rows))
    return root
