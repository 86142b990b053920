"""Bricks: what recipes, merges and operations share, so that each of them reads top to bottom."""

from workers.loading.adapters import BASE_FILE, canonical_adapter, check_base, read_adapter, write_base_record
from workers.loading.chain import (
    Start,
    attach,
    check_layers,
    checked_start,
    fold,
    folded,
    layer_digests,
    starting_point,
)
from workers.loading.companions import copy_companions, has_tokenizer, tokenizer_files
from workers.loading.conversations import Encoded, encode, encode_dataset, load_dataset, load_tokenizer, stop_tokens
from workers.loading.devices import Compute, device_and_dtype, peak_memory, set_threads
from workers.loading.merge_spec import MergeSpec
from workers.loading.models import attach_adapter, base_label, check_weights, load_base, load_model, refuse_quantised
from workers.loading.prepared import lengths, origin, read_rows, rows_file, rows_of
from workers.loading.proof import PROMPTS, Effect, changed_tensors, compare, logits, prompt_ids
from workers.loading.trainer import Watch, reporter, run_trainer, takes_positions, training_arguments, watched
from workers.loading.weights import fingerprint, non_finite, sha256_files, stored_dtype, tensor_headers

__all__ = [
    "BASE_FILE",
    "PROMPTS",
    "Compute",
    "Effect",
    "MergeSpec",
    "Encoded",
    "Start",
    "Watch",
    "attach",
    "attach_adapter",
    "base_label",
    "canonical_adapter",
    "changed_tensors",
    "check_base",
    "check_layers",
    "check_weights",
    "checked_start",
    "compare",
    "copy_companions",
    "device_and_dtype",
    "encode",
    "encode_dataset",
    "fingerprint",
    "fold",
    "folded",
    "has_tokenizer",
    "layer_digests",
    "lengths",
    "load_base",
    "load_dataset",
    "load_model",
    "load_tokenizer",
    "logits",
    "non_finite",
    "origin",
    "peak_memory",
    "prompt_ids",
    "read_adapter",
    "refuse_quantised",
    "read_rows",
    "reporter",
    "rows_file",
    "rows_of",
    "run_trainer",
    "set_threads",
    "starting_point",
    "sha256_files",
    "stop_tokens",
    "stored_dtype",
    "takes_positions",
    "tensor_headers",
    "tokenizer_files",
    "training_arguments",
    "watched",
    "write_base_record",
]
