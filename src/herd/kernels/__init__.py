"""Fused operators, one idea a file, each with a plain torch reference."""
