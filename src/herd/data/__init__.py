"""From text to batches: corpora, token shards, the streams that are pure functions of a position, dialogs.

Import from the modules: `herd.data.corpus`, `shards`, `stream`, `packing`, `needle`, `dialogs`; nothing is loaded here.
"""
