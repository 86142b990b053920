"""What a reward model of the registry thinks of an answer."""

from typing import Literal

from app.catalog import Bench, Grader
from app.grading import GraderSpec, Scoring
from app.specs import RewardRef
from workers.loading import Compute
from workers.loading.judging import reward_scoring


class RewardModelSpec(GraderSpec):
    """The reward model's own number for the conversation; any size, higher is better."""

    type: Literal["reward_model"] = "reward_model"
    model: RewardRef


def load(spec: RewardModelSpec, bench: Bench) -> Scoring:
    """Loads it once for the run."""
    return reward_scoring(bench.ctx, f"{bench.field}.model", Compute(bench.device, bench.dtype), bench.batch_size)


grader = Grader(RewardModelSpec, load=load)
