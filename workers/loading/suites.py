"""Suites of lm-evaluation-harness by name, asked of a model that is loaded already, or of one that is served.

The package is not installed with this service: it brings some thirty others along.
"""

import difflib
import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from statistics import fmean
from typing import Any, NamedTuple

from app.catalog import Interrupted, RunContext
from app.errors import Code, RunError
from app.specs import Better
from workers.loading.paired import Change, compare
from workers.loading.said import digest
from workers.loading.served import ServedModel
from workers.loading.suites_served import harness_model

PACKAGE = "lm-eval"
HOW = f"Install it beside the service: .venv/bin/python -m pip install '{PACKAGE}[api]'; then start the service again."
_BOOTSTRAPS = 1000
_TICK_SECONDS = 1.0
Key = tuple[str, str, str]
"""Task, metric, and the filter that the answers went through before they were scored."""


class Score(NamedTuple):
    """A metric of a task: its value, its standard error if it has one, and each document's own number if it has one."""

    value: float
    stderr: float | None
    better: Better
    each: Mapping[int, float]


class Asked(NamedTuple):
    """What a model came to, and the documents with its answers."""

    scores: dict[Key, Score]
    samples: list[dict[str, Any]]


def installed() -> bool:
    """Whether this environment has the package."""
    return importlib.util.find_spec("lm_eval") is not None


def asks_served() -> bool:
    """Whether it also has what it asks a served model with."""
    return installed() and all(importlib.util.find_spec(name) is not None for name in ("requests", "tenacity"))


class Suites:
    """The tasks that a job names. Raises RunError bad_spec for one that there is not."""

    def __init__(self, names: Sequence[str], fewshot: int | None, limit: int | None, ctx: RunContext) -> None:
        if not installed():  # the API and this worker may live in two environments
            raise RunError(Code.BAD_SPEC, f"tasks: {PACKAGE} is not installed here", param="tasks", hint=HOW)
        from lm_eval.tasks import TaskManager

        self._manager = TaskManager(include_path=str(ctx.task_folder) if ctx.task_folder else None)
        known = self._manager.all_tasks
        for place, name in enumerate(names):
            # Looked up here: the package would take what it does not know for the path of a file, and run what it says.
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                raise RunError(
                    Code.BAD_SPEC,
                    f"tasks.{place}: {PACKAGE} has no suite {name!r}",
                    param=f"tasks.{place}",
                    hint=f"Did you mean {', '.join(near)}?" if near else "lm_eval ls tasks lists them all.",
                )
        self._names, self._fewshot, self._limit, self._ctx = list(names), fewshot, limit, ctx

    def ask(self, side: str, model: Any, tokenizer: Any, batch_size: int, *, template: bool) -> Asked:
        """Every task, of one model. Raises RunError model_unreachable where a task's data cannot be fetched.

        ``side``: whose answers of an earlier attempt are used; the package keeps them.
        """
        from lm_eval.api.model import CachingLM
        from lm_eval.models.huggingface import HFLM

        plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        kept = self._ctx.kept_dir / f"suites-{side}-{digest(str(model.device), str(model.dtype))}.db"
        adapted = CachingLM(plain, str(kept))
        with closing(adapted.dbdict), _alive(model, self._ctx):
            return self._ask(adapted, template=template)

    def ask_served(self, served: ServedModel, tokenizer: Any, *, template: bool) -> Asked:
        """The same of a model that is being served. Raises RunError, and Interrupted when the run is to stop."""
        return self._ask(harness_model(served, tokenizer), template=template)

    def _ask(self, adapted: Any, *, template: bool) -> Asked:
        from lm_eval.evaluator import evaluate

        loaded = self._load()
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)
            if self._fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self._fewshot)
        found = evaluate(
            lm=adapted,
            task_dict=loaded,
            limit=self._limit,
            bootstrap_iters=_BOOTSTRAPS,
            apply_chat_template=template,
            fewshot_as_multiturn=template,
            confirm_run_unsafe_code=False,
        )
        return _read(found)

    def _load(self) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = self._manager.load(self._names)
        except (ImportError, KeyError, TypeError) as error:
            raise RunError(
                Code.BAD_SPEC, f"tasks: a suite cannot be loaded: {type(error).__name__}: {error}"[:1000], param="tasks"
            ) from error
        except Exception as error:
            raise RunError(
                Code.MODEL_UNREACHABLE,
                f"tasks: the data of a suite cannot be fetched: {type(error).__name__}: {error}"[:1000],
                param="tasks",
                hint="Check HF_ENDPOINT and the network, or fetch the data into the cache of HF_HOME beforehand.",
                transient=True,
            ) from error
        return loaded


def _read(found: Mapping[str, Any]) -> Asked:
    samples: list[dict[str, Any]] = []
    each: dict[Key, dict[int, float]] = {}
    for task, rows in (found.get("samples") or {}).items():
        for row in rows:
            chosen = str(row.get("filter", "none"))
            values = {
                name: row[name] for name in row.get("metrics", ()) if isinstance(row.get(name), bool | int | float)
            }
            for name, value in values.items():
                each.setdefault((task, name, chosen), {})[int(row["doc_id"])] = float(value)
            said = row.get("filtered_resps")
            samples.append(
                {"task": task, "doc": row["doc_id"], "filter": chosen, "target": row.get("target"), "said": said}
                | {"scores": values}
            )
    scores: dict[Key, Score] = {}
    for task, results in found["results"].items():
        for label, value in results.items():
            name, _, chosen = label.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{name}_stderr,{chosen}")
            numbers = each.get((task, name, chosen), {})
            higher = (found.get("higher_is_better") or {}).get(task, {}).get(name, True)
            scores[task, name, chosen] = Score(
                float(value),
                float(error) if isinstance(error, int | float) else None,
                "lower" if higher is False else "higher",
                numbers if _is_mean(float(value), numbers) else {},
            )
    return Asked(scores, samples)


def _is_mean(value: float, each: Mapping[int, float]) -> bool:
    """Whether a task's number is the mean of its documents'. A perplexity's are logarithms: there less is worse."""
    return bool(each) and math.isclose(value, fmean(each.values()), rel_tol=1e-6, abs_tol=1e-9)


def changes_of(before: Asked, after: Asked) -> dict[Key, Change]:
    """Document by document, where both models were asked the same and each has a number of its own."""
    found: dict[Key, Change] = {}
    for key, score in after.scores.items():
        base = before.scores.get(key)
        if base is None or len(score.each) < 2 or base.each.keys() != score.each.keys():
            continue
        order = sorted(score.each)
        found[key] = compare([base.each[doc] for doc in order], [score.each[doc] for doc in order], score.better)
    return found


@contextmanager
def _alive(model: Any, ctx: RunContext) -> Iterator[None]:
    """Says at each step of the model that the run lives, and ends it there when it is asked to stop."""
    last = 0.0

    def step(*_: Any) -> None:
        nonlocal last
        if ctx.stop_requested():
            raise Interrupted
        if time.monotonic() - last >= _TICK_SECONDS:
            last = time.monotonic()
            ctx.tick()

    hook = model.register_forward_hook(step)
    try:
        yield
    finally:
        hook.remove()
