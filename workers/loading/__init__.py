"""Bricks: what recipes, merges and operations share, so that each of them reads top to bottom."""

from workers.loading.adapters import (
    BASE_FILE,
    Adapter,
    canonical_adapter,
    check_base,
    layer_digests,
    read_adapter,
    write_base_record,
)
from workers.loading.chain import (
    Start,
    attach,
    check_chain,
    check_layers,
    checked_start,
    fold,
    layers_below,
    starting_point,
)
from workers.loading.combining import Join, best_of_rank, by_factor, concatenate
from workers.loading.companions import copy_companions, has_tokenizer, tokenizer_files
from workers.loading.conversations import Encoded, encode, encode_dataset, load_dataset, load_tokenizer, stop_tokens
from workers.loading.devices import Compute, device_and_dtype, peak_memory, set_threads
from workers.loading.effect import TooLarge, measure_effect, vocabulary_of
from workers.loading.fresh import attach_adapter, keep_start, make_plain
from workers.loading.held_out import read_data
from workers.loading.learning import LearningCheck, held_rows
from workers.loading.merge_spec import MergeSpec
from workers.loading.merged import merge_combined
from workers.loading.merging import copy_beside, read_merge, write_merge
from workers.loading.mixed import merge_models
from workers.loading.mixing import Mixture, Part, Whole, agreed
from workers.loading.models import base_label, check_weights, load_base, load_model, refuse_quantised
from workers.loading.prepared import lengths, origin, read_rows, rows_file, rows_of
from workers.loading.proof import PROMPTS, Effect, compare, logits, prompt_ids
from workers.loading.proved import merge_adapter
from workers.loading.recount import Findings, Recount
from workers.loading.row_losses import answer_logprobs, label_measure, row_scores
from workers.loading.selecting import threshold
from workers.loading.sharding import save_trained, sharding
from workers.loading.trainer import Watch, reporter, run_trainer, takes_positions, training_arguments, watched
from workers.loading.weights import fingerprint, non_finite, sha256_files, stored_dtype, tensor_headers

__all__ = [
    "BASE_FILE",
    "PROMPTS",
    "Adapter",
    "Compute",
    "Effect",
    "Findings",
    "Join",
    "MergeSpec",
    "Mixture",
    "Part",
    "Recount",
    "TooLarge",
    "Encoded",
    "LearningCheck",
    "Start",
    "Watch",
    "Whole",
    "agreed",
    "answer_logprobs",
    "attach",
    "attach_adapter",
    "base_label",
    "best_of_rank",
    "by_factor",
    "canonical_adapter",
    "check_base",
    "check_chain",
    "check_layers",
    "check_weights",
    "checked_start",
    "compare",
    "concatenate",
    "copy_beside",
    "copy_companions",
    "device_and_dtype",
    "encode",
    "encode_dataset",
    "fingerprint",
    "fold",
    "has_tokenizer",
    "held_rows",
    "keep_start",
    "label_measure",
    "layer_digests",
    "layers_below",
    "lengths",
    "load_base",
    "load_dataset",
    "load_model",
    "load_tokenizer",
    "make_plain",
    "logits",
    "measure_effect",
    "merge_adapter",
    "merge_combined",
    "merge_models",
    "non_finite",
    "origin",
    "peak_memory",
    "prompt_ids",
    "read_adapter",
    "read_data",
    "read_merge",
    "refuse_quantised",
    "read_rows",
    "reporter",
    "row_scores",
    "rows_file",
    "rows_of",
    "run_trainer",
    "save_trained",
    "set_threads",
    "sharding",
    "starting_point",
    "sha256_files",
    "stop_tokens",
    "stored_dtype",
    "takes_positions",
    "threshold",
    "tensor_headers",
    "tokenizer_files",
    "training_arguments",
    "vocabulary_of",
    "watched",
    "write_base_record",
    "write_merge",
]
