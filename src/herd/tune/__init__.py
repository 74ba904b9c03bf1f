"""`herd tune`: fine-tune a model on dialogs or preferences, merge adapters, and measure what was gained and lost."""
