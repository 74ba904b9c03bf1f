"""Fused operators, one idea per file, each with a plain torch reference."""
