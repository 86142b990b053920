"""Policy, value and reference on one set of weights: switched by adapter, so that no second copy is needed."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from app.specs import ModelBlock

POLICY, VALUE = "default", "value"
Part = Literal["policy", "value", "reference"]


class Judged(NamedTuple):
    """Log-probabilities and entropies of an answer's tokens: (rows, tokens)."""

    logprobs: Any
    entropy: Any


class ActorCritic:
    """With an adapter: the policy is one LoRA adapter, the critic another, the reference neither.

    A full fine-tune keeps a frozen copy as reference and puts the value head on the policy's own features. Dropout is
    off everywhere: it would make the same tokens more or less likely in the update than they were in the rollout.
    """

    def __init__(self, model: Any, block: ModelBlock, temperature: float) -> None:
        import torch

        self.model = model
        self.temperature = temperature
        self.peft = block.peft_config is not None
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        # peft takes a second adapter only where the base's biases are left alone.
        self.own_critic = self.peft and block.peft_config is not None and block.peft_config.bias == "none"
        if self.own_critic:
            config = copy.deepcopy(model.peft_config[POLICY])
            config.lora_dropout, config.modules_to_save = 0.0, None
            model.add_adapter(VALUE, config)
            for parameter in self._adapter(VALUE):
                parameter.data = parameter.data.float()
        self._copy = None if self.peft else copy.deepcopy(model).eval().requires_grad_(False)
        inner = model.get_base_model() if self.peft else model
        self._backbone_of = inner
        hidden = inner.config.get_text_config().hidden_size
        self.head = torch.nn.Linear(hidden, 1).to(model.device)
        torch.nn.init.normal_(self.head.weight, std=1 / (hidden + 1) ** 0.5)
        torch.nn.init.zeros_(self.head.bias)
        self._policy_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.own_critic:
            mine = {id(parameter) for parameter in self._adapter(VALUE)}
            self._policy_parameters = [part for part in self._policy_parameters if id(part) not in mine]
        self._wake()

    def parameters(self) -> list[Any]:
        """What is trained: policy, critic, value head; each once, in an order that a resume keeps."""
        critic = self._adapter(VALUE) if self.own_critic else []
        return [*self._policy_parameters, *critic, *self.head.parameters()]

    def policy_parameters(self) -> dict[str, Any]:
        """What is trained of the policy, by name."""
        mine = {id(parameter) for parameter in self._policy_parameters}
        return {name: weight for name, weight in self.model.named_parameters() if id(weight) in mine}

    def _adapter(self, name: str) -> list[Any]:
        return [parameter for key, parameter in self.model.named_parameters() if f".{name}." in key and "lora_" in key]

    def _wake(self) -> None:
        """peft freezes every adapter that is not the active one; both are trained."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        assert all(parameter.requires_grad for parameter in self.parameters())

    @contextlib.contextmanager
    def acting_as(self, part: Part) -> Iterator[Any]:
        """The model that computes this part, for as long as the block lasts."""
        if part == "reference" and self._copy is not None:
            yield self._copy
        elif part == "reference":
            with self.model.disable_adapter():
                yield self.model
            self._wake()
        elif part == "value" and self.own_critic:
            self.model.set_adapter(VALUE)
            self._wake()
            try:
                yield self.model
            finally:
                self.model.set_adapter(POLICY)
                self._wake()
        else:
            yield self.model

    def judge(self, part: Literal["policy", "reference"], ids: Any, mask: Any, answer: int) -> Judged:
        """How likely the last ``answer`` tokens of each row were. One forward without cache, at the rollout's heat."""
        import torch

        with self.acting_as(part) as model:
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=False,
                logits_to_keep=answer + 1,
            ).logits
        logits = logits[:, -answer - 1 : -1].float() / self.temperature
        every = torch.log_softmax(logits, dim=-1)
        chosen = every.gather(-1, ids[:, -answer:].unsqueeze(-1)).squeeze(-1)
        return Judged(chosen, -(every.exp() * every).sum(-1))

    def values(self, ids: Any, mask: Any, answer: int) -> Any:
        """What the critic expects before each of the last ``answer`` tokens: (rows, tokens).

        To be called, and its gradient taken, within ``acting_as("value")``: gradient checkpointing computes anew.
        """
        backbone = getattr(self._backbone_of, self._backbone_of.base_model_prefix)
        hidden = backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).last_hidden_state
        return self.head(hidden[:, -answer - 1 : -1].float()).squeeze(-1)

    def save_policy(self, folder: Path) -> None:
        """The adapter, or all weights: what the run is for."""
        if self.peft:
            self.model.save_pretrained(folder, selected_adapters=[POLICY])
        else:
            self.model.save_pretrained(folder)

    def critic_state(self) -> dict[str, Any]:
        """What a resume needs beside the policy."""
        state = {f"head.{key}": value for key, value in self.head.state_dict().items()}
        if self.own_critic:
            names = [key for key, _ in self.model.named_parameters() if f".{VALUE}." in key and "lora_" in key]
            state |= {f"adapter.{key}": dict(self.model.named_parameters())[key].detach() for key in names}
        return state

    def load_policy(self, folder: Path) -> None:
        """What ``save_policy`` left."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        weights: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
        if self.peft:
            set_peft_model_state_dict(self.model, weights, adapter_name=POLICY)
        else:
            self.model.load_state_dict(weights, strict=False)
            self.model.tie_weights()
        self._wake()

    def load(self, policy: Path, critic: dict[str, Any]) -> None:
        """Policy and critic as ``save_policy`` and ``critic_state`` left them."""
        import torch

        self.load_policy(policy)
        self.head.load_state_dict({key[5:]: value for key, value in critic.items() if key.startswith("head.")})
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, value in critic.items():
                if key.startswith("adapter."):
                    named[key[8:]].copy_(value)
        self._wake()


def positions(mask: Any) -> Any:
    """Positions that count from the first real token, so that left padding shifts nothing."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
