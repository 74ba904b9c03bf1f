"""`herd tune`: fine-tune a model on dialogs or preferences, merge adapters, and measure the changes.

`options.py` is what a user may choose, `method.py` chooses between full fine-tuning and adapters, `recipe.py`
writes the run's recipe, `preflight.py` says what will happen, `run.py` trains and compares before with after.
`inspect.py` shows what the model will see, and `merge.py` merges an adapter and measures the result.
"""
