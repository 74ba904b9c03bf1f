"""From text to batches: corpora, token shards, streams that are pure functions of the position, dialogs.

Import from the modules (`herd.data.corpus`, `shards`, `stream`, `read_dialogs`, ...); nothing is imported
here.
"""
