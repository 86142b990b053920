"""Evaluate: a model answers a file's prompts, graders score the answers, its base beside it on the same rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from app.catalog import Operation, RunContext
from app.errors import Code, RunError
from app.grading import GraderSpec, check_graders
from app.specs import Dtype, FileRef, JobSpec, ModelRef, Spec, conflict
from workers.loading import (
    Compute,
    attach,
    check_base,
    check_layers,
    device_and_dtype,
    fold,
    has_tokenizer,
    load_base,
    load_tokenizer,
    peak_memory,
    read_adapter,
    set_threads,
    stop_tokens,
)
from workers.loading.answering import answers
from workers.loading.canary import QUESTIONS
from workers.loading.judging import Judge, judge_of, load_graders, total
from workers.loading.paired import CONFIDENCE, Change, compare
from workers.loading.prompts import Prompt, load_prompts, opened
from workers.loading.suites import HOW, PACKAGE, Asked, Suites, changes_of, installed

SHOWN = 8
"""Answers that the job's result shows; the artifact has them all."""
FORGOTTEN = 0.2
"""Share of the canary's questions that the base knew and the tuned model does not, above which it is a warning."""
WORDS = {"learnt": "better", "no_effect": "no_difference", "worse": "worse"}


class EvalData(Spec):
    """Which rows are asked."""

    file: FileRef
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "prompt"] = Field(
        "auto", description="Shape of a row; auto looks at the fields. A last answer is left out of what is asked."
    )
    limit: int = Field(256, ge=2, le=100_000, description="The first so many rows.")


class Generation(Spec):
    """How answers are made."""

    max_new_tokens: int = Field(256, ge=1, le=8192)
    temperature: float = Field(0.0, ge=0, le=10, description="0 = the likeliest token each time.")
    batch_size: int = Field(8, ge=1, le=512, description="Answers that are made at a time.")
    max_prompt_tokens: int = Field(2048, ge=1, le=131_072, description="Longer prompts are left out, and counted.")
    seed: int = Field(42, ge=0, le=2**32 - 1)


class Gate(Spec):
    """When the job fails, so that nothing that waits for it begins."""

    wants: Literal["better", "not_worse"] = Field(
        "better", description="better: the whole 95 % interval of the change lies above min_change; not_worse: its end."
    )
    on: str = Field("total", max_length=64, description="A grader's name, or total.")
    min_change: float = Field(0.0, ge=-1e9, le=1e9, description="In the grader's own unit.")


class SuiteOptions(Spec):
    """How the suites are asked."""

    num_fewshot: int | None = Field(
        None, ge=0, le=64, description="Examples before each question; default the suite's."
    )
    limit: int | None = Field(None, ge=1, le=1_000_000, description="The first so many documents of each; default all.")
    chat_template: bool = Field(False, description="Ask through the model's chat template.")


TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:+-]{0,127}$")]


class EvaluateSpec(JobSpec):
    """Score a model's answers to held-out prompts or to known suites, beside those of what it was made from."""

    type: Literal["evaluate"] = "evaluate"
    takes_adapters: ClassVar[bool] = True
    model: ModelRef
    baseline: ModelRef | None = Field(
        None, description="What it is compared with; default: of an adapter what it was trained on, of a model nothing."
    )
    dataset: EvalData | None = Field(None, description="Prompts of your own; graders score the answers.")
    graders: list[GraderSpec] = Field(default_factory=list, max_length=16, description="What scores the answers.")
    tasks: list[TaskName] = Field(
        default_factory=list, max_length=32, description="Suites of lm-evaluation-harness, where it is installed."
    )
    task_options: SuiteOptions = Field(default_factory=SuiteOptions)
    weights: list[float] | None = Field(
        None, max_length=16, description="What each grader's score counts in the total; default 1."
    )
    generation: Generation = Field(default_factory=Generation)
    dtype: Dtype | None = Field(None, description="Compute dtype; default by hardware.")
    canary: bool = Field(True, description="Also ask a few general questions: did it forget what the baseline knew?")
    gate: Gate | None = Field(None, description="Fail unless the model is better than its baseline.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dataset is None and not self.tasks:
            raise conflict("dataset", "there is nothing to ask", "Give dataset and graders, or tasks.")
        if (self.dataset is None) != (not self.graders):
            field = "dataset" if self.dataset is None else "graders"
            raise conflict(field, "graders score the answers to a dataset", "Give both, or neither of them.")
        if self.tasks and not installed():
            raise conflict("tasks", f"suites need {PACKAGE}, which is not installed here", HOW)
        if self.graders:
            check_graders(self.graders, "graders", self.weights, "weights")
        names = [*(["total"] if self.graders else []), *(grader.label for grader in self.graders), *self.tasks]
        if names.count("total") > 1:
            raise conflict("graders", "a grader is called 'total', as is the sum of all", "Give it another name.")
        if self.gate is not None and self.gate.on not in names:
            raise conflict("gate.on", f"no grader or suite is called {self.gate.on!r}", f"One of: {', '.join(names)}.")
        return self


class Answered(NamedTuple):
    """What one model said, and what graders think of it."""

    texts: list[str]
    scores: dict[str, list[float]]
    known: list[bool]
    """Whether it answered each of the canary's questions."""
    suites: Asked | None = None


def run(spec: EvaluateSpec, ctx: RunContext) -> None:
    """Load, answer, score; the same for the baseline; compare, and tell."""
    set_threads()
    ctx.phase("staging")
    folder = ctx.input("model")
    is_adapter = _is_adapter(folder)
    if spec.gate is not None and not is_adapter and spec.baseline is None:
        raise RunError(
            Code.BAD_SPEC, "a gate needs something to compare with", hint="name a baseline", param="baseline"
        )
    for field in ("model", "baseline") if spec.baseline is not None else ("model",):
        if _is_adapter(ctx.input(field)) and not ctx.input_info(f"{field}.base"):
            raise RunError(
                Code.BAD_SPEC,
                f"{field}: this is an adapter whose base is not known here",
                hint="merge it into its base and name the merged model",
                param=field,
            )
    base = ctx.input("model.base") if is_adapter else folder
    ctx.phase("loading")
    compute = device_and_dtype(spec.dtype, ctx, "dtype")
    tokenizer = load_tokenizer(folder if has_tokenizer(folder) else base)
    suites = Suites(spec.tasks, spec.task_options.num_fewshot, spec.task_options.limit, ctx) if spec.tasks else None
    prompts = _prompts(spec, ctx, tokenizer)
    judge = judge_of(load_graders(spec.graders, ctx, compute, spec.generation.batch_size))
    model = _load(ctx, "model", compute)

    ctx.phase("evaluating")
    stops = stop_tokens(tokenizer, base)
    tuned = _ask(spec, ctx, model, tokenizer, prompts, judge, stops, suites)
    before: Answered | None = None
    if spec.baseline is not None:
        del model
        other = ctx.input("baseline")
        theirs = ctx.input("baseline.base") if _is_adapter(other) else other
        tokenizer = load_tokenizer(other if has_tokenizer(other) else theirs)
        again = _prompts(spec, ctx, tokenizer)
        if len(again) != len(prompts):
            raise RunError(
                Code.BAD_SPEC,
                f"model and baseline cannot be asked the same: {len(prompts)} and {len(again)} prompts fit",
                hint="raise generation.max_prompt_tokens",
                param="generation.max_prompt_tokens",
            )
        loaded = _load(ctx, "baseline", compute)
        before = _ask(spec, ctx, loaded, tokenizer, again, judge, stop_tokens(tokenizer, theirs), suites)
    elif is_adapter:
        with model.disable_adapter():
            before = _ask(spec, ctx, model, tokenizer, prompts, judge, stops, suites)
    _tell(spec, ctx, prompts, tuned, before, compute)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def _prompts(spec: EvaluateSpec, ctx: RunContext, tokenizer: Any) -> list[Prompt]:
    if spec.dataset is None:
        return []
    longest = spec.generation.max_prompt_tokens
    found = load_prompts(
        ctx.input("dataset.file"),
        spec.dataset.format,
        tokenizer,
        max_tokens=longest,
        ctx=ctx,
        room="the length of the prompts",
        graders=spec.graders,
    )[: spec.dataset.limit]
    if len(found) < 2:
        raise RunError(Code.BAD_DATA, "one row tells nothing", hint="give two rows or more", param="dataset.file")
    return found


def _load(ctx: RunContext, field: str, compute: Compute) -> Any:
    """The model behind a field, an adapter on what it was trained on. Raises RunError."""
    folder = ctx.input(field)
    if not _is_adapter(folder):
        return load_base(folder, compute).eval()
    root = ctx.input(f"{field}.base")
    layers = [Path(layer) for layer in ctx.input_info(field).get("under", ())]
    adapter = read_adapter(folder)
    check_base(adapter, root, root.name)
    check_layers(adapter.base, layers)
    below = root
    if layers:
        below = ctx.work_dir / f"below-{field}"
        fold(root, layers, root.name, below)
    return attach(load_base(below, compute), folder).eval()


def _ask(
    spec: EvaluateSpec,
    ctx: RunContext,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    judge: Judge,
    stops: set[int],
    suites: Suites | None,
) -> Answered:
    how: dict[str, Any] = {"batch_size": spec.generation.batch_size, "stops": stops, "seed": spec.generation.seed}
    texts: list[str] = []
    scores: dict[str, list[float]] = {}
    if prompts:
        longest, temperature = spec.generation.max_new_tokens, spec.generation.temperature
        texts = answers(model, tokenizer, prompts, ctx, max_new_tokens=longest, temperature=temperature, **how)
        scores = judge([prompt.answered(text) for prompt, text in zip(prompts, texts, strict=True)])
        scores["total"] = total(scores, spec.weights)
    known: list[bool] = []
    if spec.canary:
        asked = [[{"role": "user", "content": question.text}] for question in QUESTIONS]
        general = [Prompt(turns, opened(turns, tokenizer)) for turns in asked]
        said = answers(model, tokenizer, general, ctx, max_new_tokens=48, temperature=0.0, **how)
        known = [question.answered_by(text) for question, text in zip(QUESTIONS, said, strict=True)]
    asked_of = None
    if suites is not None:
        template = spec.task_options.chat_template
        asked_of = suites.ask(model, tokenizer, spec.generation.batch_size, template=template)
    return Answered(texts, scores, known, asked_of)


def _tell(
    spec: EvaluateSpec,
    ctx: RunContext,
    prompts: list[Prompt],
    tuned: Answered,
    before: Answered | None,
    compute: Compute,
) -> None:
    against = before.scores if before else {name: [0.0] * len(prompts) for name in tuned.scores}
    changes = {name: compare(against[name], scores, "higher") for name, scores in tuned.scores.items()}
    rows = list(_rows(prompts, tuned, before))
    scores = {name: _shown(change, compared=before is not None) for name, change in changes.items()}
    report: dict[str, Any] = {"rows": len(prompts), "confidence": CONFIDENCE, "scores": scores, "answers": rows[:SHOWN]}
    if spec.canary:
        report["canary"] = _canary(ctx, tuned, before)
    if tuned.suites is not None:
        report["tasks"], of_tasks = _suites(tuned.suites, before.suites if before else None)
        changes |= of_tasks
        report["task_options"] = spec.task_options.model_dump()
    if spec.gate is not None and spec.gate.on not in changes:
        raise RunError(
            Code.BAD_SPEC,
            f"gate.on: {spec.gate.on} gives no number to each document, or the models were not asked the same",
            param="gate.on",
            hint="Name a grader, or a single task instead of a group.",
        )
    passed = _passed(spec.gate, changes) if spec.gate else None
    if spec.gate is not None:
        report["gate"] = {**spec.gate.model_dump(), "passed": passed}
    ctx.result(report=report, peak_memory_bytes=peak_memory(compute.device), dtype=compute.dtype, device=compute.device)
    folder = ctx.output("report", name=spec.experiment_name)
    (folder / "report.json").write_text(json.dumps({**report, "answers": "answers.jsonl"}, indent=1) + "\n")
    with (folder / "answers.jsonl").open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if tuned.suites is not None:
        with (folder / "tasks.jsonl").open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in tuned.suites.samples)
    if spec.gate is not None and not passed:
        asked = f" on {len(prompts)} rows" if spec.gate.on in tuned.scores else ""
        change, found = changes[spec.gate.on], "is not better" if spec.gate.wants == "better" else "is worse"
        raise RunError(
            Code.GATE_NOT_PASSED,
            f"{spec.gate.on} {found}: {change.base:.4g} → {change.tuned:.4g}{asked} (change"
            f" {change.change:+.4g}, 95 % interval {change.low:+.4g} … {change.high:+.4g}, asked for"
            f" {spec.gate.min_change:+g})",
            hint="look at result.report.answers; more rows make the interval narrower",
            param="gate",
        )


def _shown(change: Change, *, compared: bool) -> dict[str, Any]:
    """One row of the report; without a baseline ``low`` and ``high`` are the interval of the score itself."""
    if not compared:
        return {
            "model": change.tuned,
            "baseline": None,
            "low": change.low,
            "high": change.high,
            "verdict": "not_compared",
        }
    return {
        "model": change.tuned,
        "baseline": change.base,
        "change": change.change,
        "low": change.low,
        "high": change.high,
        "verdict": WORDS[change.verdict],
    }


def _passed(gate: Gate, changes: dict[str, Change]) -> bool:
    change = changes[gate.on]
    low, high = (change.low, change.high) if change.better == "higher" else (-change.high, -change.low)
    return (low if gate.wants == "better" else high) > gate.min_change


def _suites(after: Asked, before: Asked | None) -> tuple[dict[str, Any], dict[str, Change]]:
    """Rows of the report by task and metric, and of each task the change in its first metric, by which a gate goes."""
    report: dict[str, dict[str, Any]] = {}
    first: dict[str, Change] = {}
    changes = changes_of(before, after) if before is not None else {}
    for key, score in after.scores.items():
        task, metric, chosen = key
        base = before.scores.get(key) if before is not None else None
        entry: dict[str, Any] = {
            "model": score.value,
            "stderr": score.stderr,
            "baseline": base.value if base is not None else None,
            "better": score.better,
            "documents": len(score.each) or None,
            "verdict": "not_compared",
        }
        if key in changes:
            change = changes[key]
            entry |= {"change": change.change, "low": change.low, "high": change.high}
            entry["verdict"] = WORDS[change.verdict]
            first.setdefault(task, change)
        report.setdefault(task, {})[metric if chosen == "none" else f"{metric},{chosen}"] = entry
    return report, first


def _canary(ctx: RunContext, tuned: Answered, before: Answered | None) -> dict[str, Any]:
    found: dict[str, Any] = {"questions": len(QUESTIONS), "model": sum(tuned.known)}
    if before is None:
        return found
    pairs = list(zip(QUESTIONS, before.known, tuned.known, strict=True))
    lost = [question.text for question, then, now in pairs if then and not now]
    found |= {
        "baseline": sum(before.known),
        "lost": lost,
        "gained": [question.text for question, then, now in pairs if now and not then],
    }
    if len(lost) > FORGOTTEN * len(QUESTIONS):
        message = f"{len(lost)} of {len(QUESTIONS)} general questions that the baseline answers are no longer answered"
        ctx.event("general_knowledge_lost", message, level="warn", lost=lost)
    return found


def _rows(prompts: list[Prompt], tuned: Answered, before: Answered | None) -> Iterator[dict[str, Any]]:
    for row, prompt in enumerate(prompts):
        entry: dict[str, Any] = {"row": row + 1, "prompt": prompt.turns, "model": tuned.texts[row]}
        entry["scores"] = {name: scores[row] for name, scores in tuned.scores.items()}
        if before is not None:
            entry["baseline"] = before.texts[row]
            entry["baseline_scores"] = {name: scores[row] for name, scores in before.scores.items()}
        yield entry


operation = Operation(EvaluateSpec, run, slot="train")
