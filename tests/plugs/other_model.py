"""An engine that says what it always says, whatever the model: tests/workers/fake_engine.py, taken for a real one."""

from dataclasses import replace

from tests.plugs import pretend

engine = replace(pretend.engine, name="other_model", comparable=True, embeds=True)
