"""The workers and their slots."""
