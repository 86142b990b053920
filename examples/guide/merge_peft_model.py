"""The guide's `python merge_peft_model.py`, over `tunesmith`.

--check_adapter PATH says what an adapter is, --validate PATH whether a model works, and
--base_model B --adapter_path A --output_path P merges.
"""

import argparse

from app.cli import app

parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
one = parser.add_mutually_exclusive_group()
one.add_argument("--check_adapter", "--check-adapter", metavar="PATH")
one.add_argument("--validate", metavar="PATH")
asked, rest = parser.parse_known_args()
if asked.check_adapter:
    command = ["check-adapter", asked.check_adapter]
elif asked.validate:
    command = ["validate", asked.validate]
else:
    command = ["merge"]
app([*command, *rest], prog_name="merge_peft_model.py")
