"""Worked examples of ``POST /jobs`` for the OpenAPI page."""

from typing import Any

_SFT: dict[str, Any] = {
    "type": "train",
    "algorithm": "sft",
    "experiment_name": "sft_qwen_lora_r16",
    "model": {
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "use_peft": True,
        "peft_config": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "bias": "none",
        },
    },
    "dataset": {"file": "file-0b7c1d2e3f405162738495a6"},
    "training": {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 2e-4},
    "then": ["merge", "validate", "deploy"],
}
_MERGE = {
    "type": "merge",
    "adapter": "sft_qwen_lora_r16:v1",
    "torch_dtype": "float16",
    "output_name": "support_merged",
}
_YAML = """\
type: train
algorithm: sft
model:
  model_name_or_path: Qwen/Qwen2.5-7B-Instruct
  use_peft: true
  quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4}
dataset: {file: file-0b7c1d2e3f405162738495a6}
training: {max_steps: 60, learning_rate: 2e-4}
"""

_EVALUATE: dict[str, Any] = {
    "type": "evaluate",
    "model": "support:v3",
    "dataset": {"file": "file-0b7c1d2e3f405162738495a6"},
    "graders": [{"type": "number_match", "reference": "{{item.answer}}"}],
    "gate": {"wants": "better"},
}

_EVALUATE_SERVED: dict[str, Any] = {
    **_EVALUATE,
    "deployment": "support",
    "generation": {"batch_size": 32},
    "gate": {"wants": "not_worse"},
}

_EXPORT = {
    "type": "export",
    "model": "support_merged",
    "format": "gguf",
    "outtype": "q8_0",
    "output_name": "support_q8",
}

_QUANTIZE = {"type": "quantize", "model": "support_merged", "scheme": "w4a16", "output_name": "support_w4"}
_PUSH = {
    "type": "push_to_hub",
    "model": "support_merged:v1",
    "repo_id": "acme/support",
    "private": True,
    "commit_message": "The version that passed the review",
}

BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/JobSpec"},
                "examples": {
                    "sft_lora": {"summary": "LoRA fine-tune, then merge, validate, deploy", "value": _SFT},
                    "merge": {"summary": "Merge an adapter into its base", "value": _MERGE},
                    "validate": {"summary": "Check a model", "value": {"type": "validate", "model": "support_merged"}},
                    "evaluate": {"summary": "Score a model beside its base", "value": _EVALUATE},
                    "evaluate_served": {"summary": "Score what is served, over its engine", "value": _EVALUATE_SERVED},
                    "export": {"summary": "Write a model as GGUF", "value": _EXPORT},
                    "quantize": {"summary": "Fewer bits a weight, for vLLM", "value": _QUANTIZE},
                    "push_to_hub": {"summary": "Put a model into a repository of the hub", "value": _PUSH},
                    "deploy": {
                        "summary": "Serve a model",
                        "value": {"type": "deploy", "model": "support_merged", "name": "support"},
                    },
                },
            },
            "application/yaml": {
                "schema": {"$ref": "#/components/schemas/JobSpec"},
                "examples": {"qlora": {"summary": "QLoRA fine-tune", "value": _YAML}},
            },
        },
    }
}
