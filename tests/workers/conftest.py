"""A model small enough to be trained in a second, with a tokenizer trained on the spot."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import HubServer, running
from tests.hub.store import Account

# torch and transformers are imported where they are used: importing them takes each test process 10 s of CPU, and most
# tests that are collected beside this file, the fault suite first, never touch them.

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SYSTEM = "Spell the number in words."
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(number: int) -> list[dict[str, str]]:
    """Digits in, words out."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": str(number)},
        {"role": "assistant", "content": " ".join(WORDS[int(digit)] for digit in str(number))},
    ]


def make_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of 400 entries, saved to the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [turn["content"] for number in range(300) for turn in conversation(number)]
    core.train_from_iterator(
        [*texts, "system\nuser\nassistant\n"] * 2,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(
    folder: Path, *, architecture: str = "llama", seed: int = 0, dtype: str = "float32", **config: int
) -> Path:
    """Two layers, 64 wide, 4 heads of which 2 for keys, unless ``config`` says otherwise; random weights."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[architecture]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    whole = config_class(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **sizes | config,
    )
    model_class(whole).to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


def make_servable_model(folder: Path) -> Path:
    """Heads of 64, as wide as vLLM's CPU kernels want them."""
    return make_model(folder, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products this small only wait for each other on several cores."""
    monkeypatch.setattr("workers.loading.devices.os.sched_getaffinity", lambda _: {0})
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


TOKEN = "hf_" + "canaryThatNobodyMaySee" * 2


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A stand-in for the hub with an empty cache, for this process and for those that it starts.

    ``alice`` of ``acme`` may write; her token is in the environment.
    """
    from huggingface_hub import constants  # noqa: PLC0415

    home = tmp_path / "hf"
    with running() as server:
        server.store.accounts[TOKEN] = Account("alice", ("acme",))
        for name, value in {"HF_TOKEN": TOKEN, "HF_ENDPOINT": server.url, "HF_HOME": str(home)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
        # Read when the library was imported; a runner reads the environment.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tokenizer and chat template; do not write into it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 conversations that can be learnt."""
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(200)))
    return path
