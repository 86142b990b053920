"""A serving engine over transformers' ``generate``: for machines that vLLM does not run on."""
