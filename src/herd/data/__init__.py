"""From text to batches: corpora, token shards, streams of rows, and dialogs.

Import from the modules (`herd.data.corpus`, `shards`, `stream`, `read_dialogs`, ...). Nothing is imported
here.
"""
