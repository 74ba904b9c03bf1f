"""`herd serve`: turn a model into an endpoint for OpenAI's clients."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..errors import ConfigError
from .common import MODEL, Device, Dtype, Kv, Pre, Threads

DEFAULT_PORT = 8000


def serve_command(
    folder: Annotated[str, Argument(metavar="MODEL", help=MODEL)],
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, Option(min=0, max=65535, help="Port to listen on (0: any free one).")
    ] = DEFAULT_PORT,
    alias: Annotated[
        list[str] | None, Option(help="Another name of the model for clients ('*': every name). Repeatable.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        Option(help="NAME=FOLDER of a LoRA adapter that chat clients get as the model NAME. Repeatable."),
    ] = None,
    context: Annotated[
        int | None,
        Option(min=2, help="Longest prompt and answer in tokens (default: the model's, or what fits)."),
    ] = None,
    parallel: Annotated[int, Option(min=1, max=1024, help="Most answers generated at once.")] = 16,
    queue: Annotated[int, Option(min=1, help="Most requests that wait; more are told to try again.")] = 512,
    cache_gb: Annotated[
        float | None, Option(min=0, help="Memory for the KV cache in GB (default: what is needed and free).")
    ] = None,
    keep_cache: Annotated[
        Path | None,
        Option(help="Folder that keeps computed prompts across restarts, at most as large as the KV cache."),
    ] = None,
    draft: Annotated[str | None, Option(help="A smaller draft model, or ngram.")] = None,
    allow_host: Annotated[
        list[str] | None, Option(help="Another name of this machine that clients use ('*': every name).")
    ] = None,
    strict: Annotated[bool, Option("--strict", help="Refuse unknown fields instead of warning.")] = False,
    keys: Annotated[
        bool | None,
        Option(
            "--keys/--no-keys",
            help="Whether clients need a key (default: if any was created). The first start prints an admin's key.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        Option(help="File or URL of the keys (default: HERD_STORE, or ~/.local/share/herd/serve.db)."),
    ] = None,
    drain: Annotated[float, Option(min=0, help="Seconds for open answers to finish at the end.")] = 30.0,
    kv: Kv = "auto",
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    pre: Pre = None,
) -> None:
    """Serve a model to programs that speak OpenAI's API, until Ctrl-C.

    Without keys (`herd keys`) the server only listens to its own machine. The sampling settings default to the
    checkpoint's, or to greedy decoding if it has none, as in `herd chat`.
    """
    from ..checkpoint import ModelSource
    from ..serve.app import create_app
    from ..serve.auth import check_binding
    from ..serve.keys import first_admin_key
    from ..serve.run import HerdServer
    from ..serve.settings import ServeSettings

    opened = _open_store(store, keys)
    check_binding(host, with_keys=opened is not None)
    settings = ServeSettings(
        host=host, allowed_hosts=tuple(allow_host or ()), strict=strict, drain_seconds=drain
    )
    _check_port(host, port)
    source = ModelSource(folder, pre=pre)
    served = _open(
        source, tuple(alias or ()), context, parallel, queue, cache_gb, keep_cache, draft, kv, dtype, device,
        tuple(adapter or ()),
    )  # fmt: skip
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    app = create_app(served, opened, settings)
    if opened is not None and (token := first_admin_key(opened, "first start")):
        print(f"admin key, shown only this once: {token}", file=sys.stderr)

    def when_ready(bound: int) -> None:
        place = f"[{host}]" if ":" in host else host
        print(
            f"{served.name}: context {served.context:,} tokens, {parallel} answers at once", file=sys.stderr
        )
        print(f"chat page:    http://{place}:{bound}/", file=sys.stderr)
        print(f"for programs: http://{place}:{bound}/v1  (Ctrl-C stops)", file=sys.stderr, flush=True)

    server = HerdServer(app, settings, port, when_ready)
    try:
        server.run()
    finally:
        served.loop.close()
        if opened is not None:
            opened.close()


def _open_store(place: str | None, wanted: bool | None) -> Any:
    """Open the store of keys. None if clients need no key: not ``wanted``, or no key was ever created."""
    from ..serve.keys import has_keys
    from ..serve.store import Store, default_store

    place = place or default_store()
    if wanted is False or (wanted is None and "://" not in place and not Path(place).exists()):
        return None
    store = Store(place)
    if wanted or has_keys(store):
        return store
    store.close()
    return None


def _check_port(host: str, port: int) -> None:
    """Raise ConfigError if the port is taken, before the model is loaded."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--host {host} --port {port}: {reason}; choose another port") from None


def _open(
    source: Any,
    aliases: tuple[str, ...],
    context: int | None,
    parallel: int,
    queue: int,
    cache_gb: float | None,
    keep_cache: Path | None,
    draft: str | None,
    kv: str,
    dtype: str | None,
    device: str | None,
    adapters: tuple[str, ...],
) -> Any:
    """Load the model and start its engine."""
    from ..checkpoint.sources import model_name
    from ..engine.engine import Engine
    from ..engine.loop import EngineLoop
    from ..serve.chat import ServedModel
    from .chat_memory import cache_budget, plan_context
    from .chat_model import compute_kind, load_chat_model, load_draft

    kind, device = compute_kind(source, dtype, device)
    limit = plan_context(source, kind, device, kv, context)
    model = load_chat_model(source, dtype, device)
    draft_model = load_draft(draft, model, dtype, device) if draft else None
    budget = int(cache_gb * 1e9) if cache_gb else cache_budget(source.config, device, limit, parallel)
    names = put_adapters(model.model, adapters)
    engine = Engine(
        model.model,
        model.tokenizer,
        max_batch=parallel,
        max_context=limit,
        cache_bytes=budget,
        kv=kv,
        draft=draft_model,
    )
    name = model.lineage.name if model.lineage else model_name(source.path)
    config = source.config
    facts: dict[str, Any] = {
        "n_params": config.n_params,
        "n_ctx_train": config.max_context,
        "n_embd": config.dim,
    }
    if model.lineage is not None:  # for the card on the chat page
        shown = {"stage", "licence", "parents", "evals", "created_by", "weights_hash"}
        facts |= model.lineage.model_dump(include=shown, exclude_none=True)
    return ServedModel(
        name,
        EngineLoop(engine, queue, keep_cache),
        model.tokenizer,
        limit,
        frozenset(aliases),
        model.sampling_defaults,
        model.is_base,
        int(time.time()),
        facts,
        f"herd-{engine.cache.kind}-{kind or 'stored'}",
        names,
    )


def put_adapters(model: Any, given: tuple[str, ...]) -> frozenset[str]:
    """Put the adapters NAME=FOLDER on a model and return their names."""
    from ..checkpoint.adapters import read_adapter
    from ..llama.switched import switch_adapters

    adapters = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ConfigError(f"--adapter {text}: give NAME=FOLDER, e.g. support=runs/tune/support/adapter")
        adapters[name] = read_adapter(Path(folder)).layers
    if adapters:
        switch_adapters(model, adapters)
    return frozenset(adapters)
