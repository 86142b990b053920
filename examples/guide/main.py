"""The guide's `python main.py --config config.yaml --mode train --algorithm sft --experiment_name NAME`.

Trains in the foreground, over `tunesmith train --follow`. `./outputs` becomes a link to the outputs of the service.
"""

import argparse
import sys

from app.cli import app
from app.commands.folders import link_outputs

parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--mode", choices=["train"], default="train")
_, rest = parser.parse_known_args()
if not {"-h", "--help"} & set(sys.argv):
    link_outputs()
app(["train", "--follow", *rest], prog_name="main.py")
