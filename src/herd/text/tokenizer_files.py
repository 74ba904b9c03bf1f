"""Read a tokenizer from files: which class fits, and what the files around it say.

A folder in Hugging Face's layout has the vocabulary (``tokenizer.json``, or ``tokenizer.model`` with ranks or
a SentencePiece model) and settings: names of special tokens and the chat template in
``tokenizer_config.json``, a template in ``chat_template.jinja``, stop tokens in ``config.json`` and
``generation_config.json``. All stop tokens count.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, TokenizerError
from .ranks import read_ranks
from .ranks_tokenizer import NEEDED_SPECIAL, RanksTokenizer
from .tokenizer import ROLES, Tokenizer
from .tokenizer_json import read_tokenizer_json
from .vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, read_sentencepiece

SETTINGS, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"


def register() -> None:
    """Register the readers of files and the trainer at `Tokenizer`. Called when `herd.text` is imported."""
    Tokenizer.trainer = RanksTokenizer.train
    Tokenizer.readers.update(
        {"": read_folder, ".json": read_json_file, ".model": read_model_file, ".gguf": _read_gguf}
    )


def read_model_file(path: Path) -> Tokenizer:
    """Read a ``tokenizer.model``: Meta's ranks, or a SentencePiece model."""
    if not _is_sentencepiece(path):
        return RanksTokenizer(read_ranks(path))
    return _from_sentencepiece(path, {})


def read_json_file(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json`` alone, and ignore the settings next to it."""
    return _from_json(path, {}, {})


def read_folder(folder: Path) -> Tokenizer:
    """Read the tokenizer of a folder with its settings. Raises `TokenizerError` if it has none."""
    model, json_ = folder / "tokenizer.model", folder / "tokenizer.json"
    settings, ids = _read_object(folder / SETTINGS), _Ids(folder)
    given = _read_object(folder / "special_tokens_map.json") | settings
    names = {key: text for key in given if key.endswith("_token") and (text := token_text(given[key]))}
    if not model.exists() and not json_.exists():
        if any(folder.glob("*.gguf")):
            return _read_gguf(folder)
        raise TokenizerError(f"{folder}: has neither tokenizer.model nor tokenizer.json")
    if json_.exists() and model.exists() and not _is_sentencepiece(model):
        ranks, known = read_ranks(model), read_tokenizer_json(json_, compare_merges=False)
        if known is None or known[0] != ranks:
            raise TokenizerError(f"{folder}: tokenizer.model and tokenizer.json differ; remove the wrong one")
        tokenizer = _with_ranks(known) or _from_json(json_, names, settings | ids.named)
    elif json_.exists():
        tokenizer = _from_json(json_, names, settings | ids.named)
    elif _is_sentencepiece(model):
        tokenizer = _from_sentencepiece(model, settings, names, _read_object(folder / "added_tokens.json"))
    else:
        tokenizer = RanksTokenizer(read_ranks(model))
    stop_ids = ids.stop_ids(tokenizer)
    if (eos := tokenizer.special_tokens.get(names.get("eos_token", ""))) is not None:
        stop_ids.add(eos)
    template, with_tools = _templates(settings.get("chat_template"))
    if (folder / TEMPLATE_FILE).exists():
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8", errors="replace")
    if (folder / TOOL_TEMPLATE_FILE).exists():
        with_tools = (folder / TOOL_TEMPLATE_FILE).read_text(encoding="utf-8", errors="replace")
    return tokenizer.with_settings(
        stop_ids=stop_ids,
        chat_template=template,
        tool_template=with_tools,
        token_names=names,
        where=str(folder),
    )


def _from_json(path: Path, names: Mapping[str, str], settings: Mapping[str, Any]) -> Tokenizer:
    known = read_tokenizer_json(path)
    tokenizer = _with_ranks(known) if known is not None else None
    if tokenizer is not None:
        return tokenizer
    from .library_tokenizer import LibraryTokenizer, read_library  # importing tokenizers takes 20 ms

    library = read_library(path)
    roles = {role: names.get(f"{role}_token") for role in ROLES}
    for role in ROLES:
        id_ = settings.get(f"{role}_token_id")
        # no token has this name: the model's configuration may name its id
        if library.token_to_id(roles[role] or "") is None:
            roles[role] = library.id_to_token(id_) if type(id_) is int and id_ >= 0 else None
    add_bos = settings.get("add_bos_token") is True
    return LibraryTokenizer(library, **roles, add_bos=add_bos, vocabulary=None)


def _with_ranks(known: tuple[dict[bytes, int], dict[str, int]]) -> RanksTokenizer | None:
    """Return a tokenizer of ranks if the special tokens are Llama 3's."""
    ranks, special = known
    in_order = sorted(special.values()) == list(range(len(ranks), len(ranks) + len(special)))
    return RanksTokenizer(ranks, special) if in_order and special.keys() >= set(NEEDED_SPECIAL) else None


def _is_sentencepiece(path: Path) -> bool:
    """Return whether the file is protobuf and not text."""
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except OSError:
        return False  # the reader of ranks reports it
    return beginning[:1] == b"\n" and any(byte < 9 or byte == 0x15 for byte in beginning)


def _from_sentencepiece(
    path: Path,
    settings: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    added: Mapping[str, Any] | None = None,
) -> Tokenizer:
    from .library_tokenizer import LibraryTokenizer

    try:
        vocabulary = read_sentencepiece(path.read_bytes())
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    more = {name: (id_, USER_DEFINED) for name, id_ in (added or {}).items()}
    for id_, token in (settings.get("added_tokens_decoder") or {}).items():
        kind = CONTROL if token.get("special") else USER_DEFINED
        more[token["content"]] = (int(id_), kind)
    vocabulary = _extended(vocabulary, more, path)
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | dict(names or {})
    roles = {role: defaults.get(f"{role}_token") for role in ROLES}
    known = {role: name if name in vocabulary.ids else None for role, name in roles.items()}
    return LibraryTokenizer(
        vocabulary.build(), **known, add_bos=settings.get("add_bos_token") is not False, vocabulary=vocabulary
    )


def _extended(vocabulary: Vocabulary, added: Mapping[str, tuple[int, int]], path: Path) -> Vocabulary:
    """Return the vocabulary with tokens that were added after it was trained."""
    tokens, types, scores = vocabulary.tokens, list(vocabulary.types), list(vocabulary.scores or ())
    for name, (id_, kind) in sorted(added.items(), key=lambda item: item[1]):
        if id_ < len(tokens):
            types[id_] = kind if tokens[id_] == name and types[id_] != UNKNOWN else types[id_]
        elif id_ == len(tokens):
            tokens, types, scores = [*tokens, name], [*types, kind], [*scores, 0.0]
        else:
            raise TokenizerError(f"{path}: the added token {name!r} has id {id_}, {len(tokens)} is free")
    return Vocabulary(tokens, types, scores=scores, add_space_prefix=vocabulary.add_space_prefix)


def _read_gguf(path: Path) -> Tokenizer:
    # GGUF is read on a higher floor, so this goes through the lazy functions of the package
    tokenizer = importlib.import_module("herd").load_tokenizer(path)
    if tokenizer is None:
        raise TokenizerError(f"{path}: has no tokenizer")
    return tokenizer


class _Ids:
    """The token ids that a folder's ``config.json`` and ``generation_config.json`` name."""

    def __init__(self, folder: Path) -> None:
        paths = [folder / name for name in ("config.json", "generation_config.json")]
        self._settings = {path: _read_object(path) for path in paths}
        self.named: dict[str, Any] = {}
        for settings in self._settings.values():
            self.named |= {key: value for key, value in settings.items() if key.endswith("_token_id")}

    def stop_ids(self, tokenizer: Tokenizer) -> set[int]:
        """Return the end-of-text ids. Warns about those outside the vocabulary and leaves them out."""
        found: set[int] = set()
        for path, settings in self._settings.items():
            value = settings.get("eos_token_id")
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(id_) is int for id_ in values):
                raise CheckpointError(
                    f"{path}: eos_token_id={value!r} is not a token id or a list of them; fix or delete it"
                )
            outside = [id_ for id_ in values if not 0 <= id_ < tokenizer.vocab_size]
            if outside:
                note = f"{path}: eos_token_id: ignoring {outside}, which are not tokens of its vocabulary"
                warnings.warn(note, stacklevel=5)
            found |= set(values) - set(outside)
        return found


def token_text(value: Any) -> str:
    """Return the text of a special token, which is a string or an object with the string as ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _templates(value: Any) -> tuple[str | None, str | None]:
    """Return the default template and the one for tools, from a text or from a list of named templates."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        default = named.get("default", next(iter(named.values()), None))
        tools = named.get("tool_use")
        return (default if isinstance(default, str) else None), (tools if isinstance(tools, str) else None)
    return (value if isinstance(value, str) else None), None


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    return value if isinstance(value, dict) else {}
