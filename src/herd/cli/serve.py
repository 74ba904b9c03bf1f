"""`herd serve`: turn models into an endpoint for the clients of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .. import units
from ..errors import ConfigError
from ..machine import available_memory
from .common import MODEL, Device, Dtype, Kv, Pre, Threads

DEFAULT_PORT = 8000
POOLED_CACHE_GB = 1.0
"""Memory for the cache of each of several models, unless --cache-gb says otherwise."""


@dataclass(frozen=True)
class OpenOptions:
    """The options with which a model is opened, as `serve_command` explains them."""

    context: int | None
    parallel: int
    queue: int
    cache_gb: float | None
    keep_cache: Path | None
    kv: str
    dtype: str | None
    device: str | None
    draft: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)


def serve_command(
    models: Annotated[
        list[str] | None,
        Argument(metavar="MODEL…", help=f"{MODEL} Several are loaded when a request names them."),
    ] = None,
    upstream: Annotated[
        list[str] | None,
        Option(
            help="Address of another server with OpenAI's API (vLLM, herd serve, …) to offer its models. "
            "Repeatable. The key is read from HERD_UPSTREAM_KEY."
        ),
    ] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, Option(min=0, max=65535, help="Port to listen on (0: any free one).")
    ] = DEFAULT_PORT,
    alias: Annotated[
        list[str] | None, Option(help="Another name of the model for clients ('*': every name). Repeatable.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        Option(
            help="NAME=FOLDER of a LoRA adapter that clients get as the model NAME. It changes the served "
            "model that is its base, or MODEL in MODEL/NAME=FOLDER. Repeatable."
        ),
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
    memory_gb: Annotated[
        float | None,
        Option(
            min=0,
            help="With several models: memory for them in GB (default: 90 % of the free). The least recently "
            "used ones are unloaded.",
        ),
    ] = None,
    draft: Annotated[
        list[str] | None,
        Option(help="A smaller draft model, or ngram. With several models: MODEL=DRAFT, repeatable."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, Option(help="Another name of this machine that clients use ('*': every name).")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        Option(help="Site whose web pages may use the server, e.g. https://app.example.org. Repeatable."),
    ] = None,
    page: Annotated[bool, Option("--page/--no-page", help="Whether browsers get the chat page.")] = True,
    strict: Annotated[bool, Option("--strict", help="Refuse unknown fields instead of warning.")] = False,
    keys: Annotated[
        bool | None,
        Option(
            "--keys/--no-keys",
            help="Whether clients need a key (default: if any exists). The first start prints an admin key.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        Option(help="File or URL of the keys (default: HERD_STORE, or ~/.local/share/herd/serve.db)."),
    ] = None,
    tools: Annotated[
        str, Option(help="Tools that the server runs for keys that have them: calculator,python.")
    ] = "",
    mcp_servers: Annotated[
        Path | None, Option(help='JSON file {"mcpServers": {NAME: …}} of servers whose tools are also run.')
    ] = None,
    tool_steps: Annotated[
        int, Option(min=1, help="Most times that the model is asked for one answer with such tools.")
    ] = 8,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Option(help="What the log has. info: one line for each request, without its content."),
    ] = "info",
    drain: Annotated[float, Option(min=0, help="Seconds for open answers to finish at the end.")] = 30.0,
    kv: Kv = "auto",
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    pre: Pre = None,
) -> None:
    """Serve models to programs that speak OpenAI's, Anthropic's or Ollama's API, until Ctrl-C.

    Without keys (`herd keys`) the server only listens to its own machine. The sampling settings default to
    the checkpoint's, or to greedy decoding if it has none, as in `herd chat`.
    """
    from ..checkpoint import ModelSource
    from ..checkpoint.sources import model_name
    from ..serve.app import create_app
    from ..serve.auth import check_binding
    from ..serve.keys import first_admin_key
    from ..serve.models import ModelPool, ModelSlot
    from ..serve.run import HerdServer
    from ..serve.settings import ServeSettings, checked_origin
    from .serve_extras import assign_adapters, assign_drafts
    from .serve_tools import choose_tools

    opened = _open_store(store, keys)
    check_binding(host, with_keys=opened is not None)
    settings = ServeSettings(
        host=host,
        allowed_hosts=tuple(allow_host or ()),
        allowed_origins=tuple(map(checked_origin, allow_origin or ())),
        strict=strict,
        has_page=page,
        drain_seconds=drain,
        tool_steps=tool_steps,
    )
    chosen_tools = choose_tools(tools, mcp_servers)
    _check_port(host, port)
    models = models or []
    if not models and not upstream:
        raise ConfigError("name a model, or another server with --upstream, e.g. herd serve smollm2")
    if len(models) > 1 and alias:
        raise ConfigError("--alias belongs to one model: serve one, or leave it out")
    sources = [ModelSource(name, pre=pre) for name in models]
    names = [{typed, model_name(source.path)} for typed, source in zip(models, sources, strict=True)]
    shared = OpenOptions(context, parallel, queue, cache_gb, keep_cache, kv, dtype, device)
    drafts, adapters = assign_drafts(names, draft or ()), assign_adapters(sources, names, adapter or ())
    options = [
        replace(shared, draft=one, adapters=several) for one, several in zip(drafts, adapters, strict=True)
    ]
    limit = None
    slots = []
    if len(sources) == 1:
        slots = [ModelSlot.of(_open(sources[0], options[0], (models[0], *(alias or ()))))]
    elif sources:
        limit = int(memory_gb * 1e9) if memory_gb else int(0.9 * available_memory())
        slots = [
            _slot(source, name, limit, own)
            for source, name, own in zip(sources, models, options, strict=True)
        ]
        if len({slot.name for slot in slots}) < len(slots):
            raise ConfigError("two models have the same name: " + ", ".join(slot.name for slot in slots))
    pool = ModelPool(slots, limit)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("herd").setLevel(log_level.upper())  # libraries say what is wrong only
    server_tools = chosen_tools.open()
    upstreams = _upstreams(upstream or [], opened, context, tuple(alias or ()) if not models else ())
    app = create_app(pool, opened, settings, server_tools, upstreams)
    if opened is not None and (token := first_admin_key(opened, "first start")):
        print(f"admin key, shown only this once: {token}", file=sys.stderr)

    def when_ready(bound: int) -> None:
        place = f"[{host}]" if ":" in host else host
        for slot in pool.slots:
            when = f"context {slot.context:,} tokens"
            if slot in slots:
                when += f", {parallel} answers at once"
            print(
                f"{slot.name}: {when if slot.served else 'loaded when a request names it'}", file=sys.stderr
            )
        if page:
            print(f"chat page:    http://{place}:{bound}/", file=sys.stderr)
        print(f"for programs: http://{place}:{bound}/v1  (Ctrl-C stops)", file=sys.stderr, flush=True)

    server = HerdServer(app, settings, port, when_ready)
    try:
        server.run()
    finally:
        pool.close()
        server_tools.close()
        if opened is not None:
            opened.close()


def _upstreams(urls: list[str], store: Any, context: int | None, aliases: tuple[str, ...]) -> Any:
    """Return the models of other servers, or None if there are none."""
    import os
    import secrets

    from ..serve.store import cache_secret
    from ..serve.upstream_model import UpstreamModels
    from ..serve.upstreams import Fleet

    if not urls:
        return None
    secret = secrets.token_bytes(32) if store is None else cache_secret(store)
    return UpstreamModels(
        Fleet(urls, os.environ.get("HERD_UPSTREAM_KEY"), secret, context), frozenset(aliases)
    )


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


def _slot(source: Any, typed: str, limit: int, options: OpenOptions) -> Any:
    """Return a model that is loaded on demand, and that clients may also call what the user ``typed``.

    Raises ConfigError if it does not fit into ``limit`` bytes alone, with its draft and its adapters, and
    EngineError or ConfigError if one of them belongs to another model.
    """
    from ..checkpoint.sources import model_name
    from ..kernels.page_layout import BYTES
    from ..serve.models import ModelSlot
    from .chat_memory import draft_nbytes, stored_nbytes
    from .chat_model import compute_kind, draft_source

    config = source.config
    kind, _ = compute_kind(source, options.dtype, options.device)
    tokens = options.context or config.max_context
    needed = options.parallel * tokens * config.kv_nbytes_per_token(BYTES["fp32"]) / 1e9
    cache_gb = options.cache_gb or min(needed, POOLED_CACHE_GB)
    nbytes = stored_nbytes(source, kind)[0] + int(cache_gb * 1e9) + _adapter_nbytes(config, options.adapters)
    if options.draft and (draft := draft_source(options.draft, source)):
        dtypes = compute_kind(draft, options.dtype, options.device)[0], kind
        nbytes += draft_nbytes(draft, source, dtypes, options.kv, int(cache_gb * 1e9))
    if nbytes > limit:
        parts = "cache, draft and adapters" if options.draft or options.adapters else "cache"
        raise ConfigError(
            f"{source.path}: {units.nbytes(nbytes)} with its {parts} do not fit into {units.nbytes(limit)}: "
            "raise --memory-gb, or lower --cache-gb"
        )

    def load() -> Any:
        return replace(_open(source, replace(options, cache_gb=cache_gb)), name=model_name(source.path))

    return ModelSlot(
        model_name(source.path), load, nbytes, tokens, frozenset({typed}), frozenset(options.adapters),
        created=int(time.time()),
    )  # fmt: skip


def _open(source: Any, options: OpenOptions, aliases: tuple[str, ...] = ()) -> Any:
    """Load the model and start its engine."""
    from ..checkpoint.sources import model_name
    from ..engine.engine import Engine
    from ..engine.loop import EngineLoop
    from ..kernels.large_pages import chunks
    from ..serve.chat import ServedModel
    from .chat_memory import cache_budget, plan_context
    from .chat_model import compute_kind, load_chat_model, load_draft

    kind, device = compute_kind(source, options.dtype, options.device)
    limit = plan_context(source, kind, device, options.kv, options.context)
    model = load_chat_model(source, options.dtype, device)
    draft = load_draft(options.draft, source, options.dtype, device) if options.draft else None
    chunks.close()  # the next model may be loaded and unloaded at other times
    budget = cache_budget(source.config, device, limit, options.parallel)
    if options.cache_gb:
        budget = int(options.cache_gb * 1e9)
    put_adapters(model.model, options.adapters)
    engine = Engine(
        model.model, model.tokenizer, max_batch=options.parallel, max_context=limit, cache_bytes=budget,
        kv=options.kv, draft=draft,
    )  # fmt: skip
    name = model.lineage.name if model.lineage else model_name(source.path)
    config = source.config
    facts: dict[str, Any] = {
        "n_params": config.n_params,
        "n_ctx_train": config.max_context,
        "n_embd": config.dim,
        "file": source.path.name,
    }
    if model.lineage is not None:  # for the card on the chat page
        shown = {"stage", "licence", "parents", "evals", "created_by", "weights_hash"}
        facts |= model.lineage.model_dump(include=shown, exclude_none=True)
    loop = EngineLoop(engine, options.queue, options.keep_cache)
    return ServedModel(
        name, loop, model.tokenizer, limit, frozenset(aliases), model.sampling_defaults, model.is_base,
        int(time.time()), facts, f"herd-{engine.cache.kind}-{kind or 'stored'}",
        frozenset(options.adapters), parallel=options.parallel,
    )  # fmt: skip


def _adapter_nbytes(config: Any, folders: Mapping[str, Path]) -> int:
    """Return the bytes of adapters on a model not loaded yet. Raises ConfigError if one has another base."""
    if not folders:
        return 0

    from ..llama.model import LlamaLM

    model = LlamaLM.on_meta(config)
    layers = [layer for layers in put_adapters(model, folders).values() for layer in layers.values()]
    return sum(4 * (a_RD.numel() + b_OR.numel()) for a_RD, b_OR, _ in layers)  # they are fp32 in memory


def put_adapters(model: Any, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Put the adapters in ``folders`` on a model, and return the updates of its layers by their names."""
    from ..checkpoint.adapters import read_adapter
    from ..llama.switched import switch_adapters

    purpose = "a base with several adapters"
    adapters = {name: read_adapter(folder).plain_layers(purpose) for name, folder in folders.items()}
    if adapters:
        switch_adapters(model, adapters)
    return adapters
