"""The guide's `python scripts/peft_model_manager.py --action save|merge`, over `tunesmith`.

save takes --model_path and --output_path; merge takes --base_model, --adapter_path, --output_path and --torch_dtype.
"""

import argparse

from app.cli import app

ACTIONS = {"save": "extract-adapter", "merge": "merge"}
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--action", choices=ACTIONS, required=True)
asked, rest = parser.parse_known_args()
app([ACTIONS[asked.action], *rest], prog_name="peft_model_manager.py")
