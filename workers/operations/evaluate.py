"""Evaluate: a model answers a file's prompts, graders score the answers, its base beside it on the same rows."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.catalog import Operation, RunContext, SlotClass
from app.errors import Code, RunError
from app.grading import GraderSpec, check_graders
from app.specs import Dtype, FileRef, JobSpec, ModelRef, Name, Spec, conflict
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
from workers.loading.canary import QUESTIONS
from workers.loading.exam import Answered, of_canary, of_rows, of_suites, shown
from workers.loading.judging import Judge, judge_of, load_graders, reads_models, total
from workers.loading.paired import CONFIDENCE, Change, compare
from workers.loading.prompts import Prompt, load_prompts, opened
from workers.loading.respondents import Deployed, Loaded, Respondent
from workers.loading.suites import HOW, PACKAGE, Suites, asks_served, installed

SHOWN = 8
"""Answers that the job's result shows; the artifact has them all."""


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
        "better",
        description="better: the 95 % interval of the change lies above min_change; not_worse: not all of it below.",
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
    asks_served: ClassVar[bool] = True
    model: ModelRef
    baseline: ModelRef | None = Field(
        None,
        description="What it is compared with; default: of an adapter what it was trained on, of a model nothing, with "
        "a gate the base that it was merged into or trained from.",
    )
    deployment: Name | None = Field(
        None,
        description="Ask the engine that serves the model under this name, of a deployment, an adapter or an alias; "
        "default: the job loads the model itself.",
    )
    baseline_deployment: Name | None = Field(
        None, description="The same of the baseline; default: whatever serves it, first where the adapter is loaded."
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
        self._check_deployment()
        if self.graders:
            check_graders(self.graders, "graders", self.weights, "weights")
        names = [*(["total"] if self.graders else []), *(grader.label for grader in self.graders), *self.tasks]
        if names.count("total") > 1:
            raise conflict("graders", "a grader is called 'total', as is the sum of all", "Give it another name.")
        if self.gate is not None and self.gate.on not in names:
            raise conflict("gate.on", f"no grader or suite is called {self.gate.on!r}", f"One of: {', '.join(names)}.")
        return self

    def _check_deployment(self) -> None:
        if self.deployment is None and self.baseline_deployment is not None:
            field, hint = "baseline_deployment", "Name the model's as deployment, or leave it out."
            raise conflict(field, "model and baseline are asked in the same way, and deployment is not given", hint)
        if self.deployment is not None and self.dtype is not None:
            raise conflict("dtype", "a deployment has a dtype of its own", "Leave it out.")
        if self.deployment is not None and self.tasks and not asks_served():
            raise conflict("tasks", f"suites of a deployment need {PACKAGE}[api], which is not installed here", HOW)


def slot_of(spec: EvaluateSpec) -> SlotClass:
    """A model that is served already needs no second place; graders that read models do."""
    return "light" if spec.deployment is not None and not reads_models(spec.graders) else "train"


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
    ctx.phase("loading")
    compute = device_and_dtype(spec.dtype, ctx, "dtype") if slot_of(spec) == "train" else Compute("cpu", "float32")
    suites = Suites(spec.tasks, spec.task_options.num_fewshot, spec.task_options.limit, ctx) if spec.tasks else None
    tokenizer, stops = _tokenizer(ctx, "model")
    prompts = _prompts(spec, ctx, tokenizer)
    judge = judge_of(load_graders(spec.graders, ctx, compute, spec.generation.batch_size))
    how: dict[str, Any] = {"batch_size": spec.generation.batch_size, "stops": stops, "seed": spec.generation.seed}
    model: Any = None
    if spec.deployment is None:
        model = _load(ctx, "model", compute)

    ctx.phase("evaluating")
    respondent: Respondent = (
        Deployed("model", tokenizer, ctx, **how) if model is None else Loaded("model", model, tokenizer, ctx, **how)
    )
    tuned = _ask(spec, respondent, tokenizer, prompts, judge, suites)
    before: Answered | None = None
    if spec.baseline is not None:
        del model, respondent
        before = _ask_baseline(spec, ctx, compute, len(prompts), judge, suites)
    elif is_adapter and model is None:
        before = _ask(spec, Deployed("baseline", tokenizer, ctx, **how), tokenizer, prompts, judge, suites)
    elif is_adapter:
        with model.disable_adapter():
            respondent = Loaded("baseline", model, tokenizer, ctx, **how)
            before = _ask(spec, respondent, tokenizer, prompts, judge, suites)
    _tell(spec, ctx, prompts, tuned, before, compute)


def _ask_baseline(
    spec: EvaluateSpec, ctx: RunContext, compute: Compute, count: int, judge: Judge, suites: Suites | None
) -> Answered:
    """The baseline that the spec names, with its own tokenizer. Raises RunError when it cannot be asked the same."""
    tokenizer, stops = _tokenizer(ctx, "baseline")
    prompts = _prompts(spec, ctx, tokenizer)
    if len(prompts) != count:
        raise RunError(
            Code.BAD_SPEC,
            f"model and baseline cannot be asked the same: {count} and {len(prompts)} prompts fit",
            hint="raise generation.max_prompt_tokens",
            param="generation.max_prompt_tokens",
        )
    how: dict[str, Any] = {"batch_size": spec.generation.batch_size, "stops": stops, "seed": spec.generation.seed}
    respondent: Respondent
    if spec.deployment is not None:
        respondent = Deployed("baseline", tokenizer, ctx, **how)
    else:
        respondent = Loaded("baseline", _load(ctx, "baseline", compute), tokenizer, ctx, **how)
    return _ask(spec, respondent, tokenizer, prompts, judge, suites)


def _tokenizer(ctx: RunContext, field: str) -> tuple[Any, set[int]]:
    """What a model reads with, and the tokens that end its answers; an adapter without one has its base's."""
    folder = ctx.input(field)
    base = ctx.input(f"{field}.base") if _is_adapter(folder) else folder
    tokenizer = load_tokenizer(folder if has_tokenizer(folder) else base)
    return tokenizer, stop_tokens(tokenizer, base)


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
    respondent: Respondent,
    tokenizer: Any,
    prompts: list[Prompt],
    judge: Judge,
    suites: Suites | None,
) -> Answered:
    texts: list[str] = []
    scores: dict[str, list[float]] = {}
    if prompts:
        longest, temperature = spec.generation.max_new_tokens, spec.generation.temperature
        texts = respondent.answers(prompts, max_new_tokens=longest, temperature=temperature)
        scores = judge([prompt.answered(text) for prompt, text in zip(prompts, texts, strict=True)])
        scores["total"] = total(scores, spec.weights)
    known: list[bool] = []
    if spec.canary:
        asked = [[{"role": "user", "content": question.text}] for question in QUESTIONS]
        general = [Prompt(turns, opened(turns, tokenizer)) for turns in asked]
        said = respondent.answers(general, max_new_tokens=48, temperature=0.0)
        known = [question.answered_by(text) for question, text in zip(QUESTIONS, said, strict=True)]
    asked_of = respondent.suites(suites, template=spec.task_options.chat_template) if suites is not None else None
    return Answered(texts, scores, known, asked_of, respondent.name)


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
    rows = list(of_rows(prompts, tuned, before))
    scores = {name: shown(change, compared=before is not None) for name, change in changes.items()}
    report: dict[str, Any] = {"rows": len(prompts), "confidence": CONFIDENCE, "scores": scores, "answers": rows[:SHOWN]}
    if spec.deployment is not None:
        report["served_as"] = {"model": tuned.name, "baseline": before.name if before else None}
    if spec.canary:
        report["canary"] = of_canary(ctx, tuned, before)
    if tuned.suites is not None:
        report["tasks"], of_tasks = of_suites(tuned.suites, before.suites if before else None)
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
    facts: dict[str, Any] = {"peak_memory_bytes": peak_memory(compute.device)}
    if spec.deployment is None:
        facts |= {"dtype": compute.dtype, "device": compute.device}
    ctx.result(report=report, **facts)
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


def _passed(gate: Gate, changes: dict[str, Change]) -> bool:
    change = changes[gate.on]
    low, high = (change.low, change.high) if change.better == "higher" else (-change.high, -change.low)
    # Two models that answer alike have an interval of no width at 0: neither is better, and neither is worse.
    return low > gate.min_change if gate.wants == "better" else high >= gate.min_change


operation = Operation(EvaluateSpec, run, slot="train", slot_of=slot_of)
