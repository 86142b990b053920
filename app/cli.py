"""The ``tunesmith`` command."""

import sys

import typer
from pydantic import ValidationError

from app.commands import adapters, data, demo, diagnose, fleet, jobs, keys, models, processes, registry, train
from app.settings import Settings, what_is_wrong

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune, merge, prove and serve language models on your own GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # --base_model and --base-model are the same option.
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
app.add_typer(jobs.group, name="jobs")
app.add_typer(data.group, name="files")
app.add_typer(registry.artifacts, name="artifacts")
app.add_typer(registry.aliases, name="aliases")
app.add_typer(models.group, name="deployments")
app.add_typer(keys.group, name="keys")
app.command()(jobs.submit)
app.command()(train.train)
app.command()(adapters.merge)
app.command()(adapters.check_adapter)
app.command()(adapters.extract_adapter)
app.command()(adapters.validate)
app.command()(diagnose.diagnose)
app.command("import")(adapters.import_model)
app.command()(adapters.push)
app.command()(models.deploy)
app.command()(models.chat)
app.command()(fleet.workers)
app.command()(keys.usage)
app.command()(processes.up)
app.command()(processes.api)
app.command()(processes.worker)
app.command()(processes.migrate)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point."""
    try:
        app()
    except ValidationError as error:
        if error.title != Settings.__name__:
            raise
        sys.exit(f"error: {what_is_wrong(error)}")


if __name__ == "__main__":
    main()
