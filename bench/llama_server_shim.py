"""Stand in for llama.cpp's `llama-server`: take its options and serve stories260K with Herd.

Importing torch takes seconds, and llama.cpp's tests start a server for every case. So one process (`serve_requests`)
imports everything, loads the model, and forks a child for each start. The program that the tests start
(`SHIM`) sends its options to that process, waits for the child, and passes signals on.

Only names are translated: options, llama.cpp's API key (a key of Herd has another form), its path ``/completions``,
and its ``/tools``, by which a web page runs the tools of MCP servers: Herd runs the same tools in its own loop, and
has no route for pages. Models that are not there get a server that only says that it is healthy, because the tests
start all of them once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHIM = f"""#!{sys.executable} -SE
import json, os, signal, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ["HERD_SHIM"])
s.sendall(json.dumps({{"arguments": sys.argv[1:], "folder": os.getcwd()}}).encode() + b"\\n")
pid = int(s.makefile().readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
while s.recv(1):
    pass
"""
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What llama.cpp uses for a model without a template."""
COMMAND_R = (
    "{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|><|' }}"
    "{{ {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message['role']] }}"
    "{{ '_TOKEN|>' + message['content'] | trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
BUILT_IN = {None: CHATML, "chatml": CHATML, "command-r": COMMAND_R}
"""Templates that llama.cpp knows by name."""
MAX_CONTEXT = 8192
"""llama.cpp lets a model go beyond its context of 512, and its tests of tools do."""
FILE = "stories260K.gguf"
"""The name that the tests know the model by."""
OURS = ("ggml-org/test-model-stories260K", "ggml-org/models")


def serve_requests(place: str, data: Path) -> None:
    """Load the model, and fork a server for every connection to the socket at ``place``."""
    import torch

    import herd.engine.engine
    import herd.engine.loop
    import herd.serve.app
    import herd.serve.run  # noqa: F401 - the children have it then

    torch.set_num_threads(1)
    model, tokenizer = stories(data)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asked = json.loads(connection.makefile().readline())
        os.chdir(asked["folder"])
        connection.sendall(f"{os.getpid()}\n".encode())
        try:
            serve(read_options(asked["arguments"]), model, tokenizer)
        finally:
            os._exit(0)  # closes the connection, which tells the waiting program


def stories(folder: Path) -> tuple[Any, Any]:
    """Return stories260K and its tokenizer, from llama2.c's files."""
    import struct

    sys.path.append(str(ROOT / "tests" / "checkpoint"))
    import torch
    from llama2c import read_llama2c, read_vocabulary

    from herd.llama.model import LlamaLM
    from herd.text.library_tokenizer import LibraryTokenizer
    from herd.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

    config, tensors = read_llama2c(folder / "stories260K.bin")
    model = LlamaLM(config.replace(max_context=MAX_CONTEXT))
    model.load_state_dict(tensors, strict=False)
    pieces = read_vocabulary(folder / "tok512.bin").pieces
    raw, at, scores = (folder / "tok512.bin").read_bytes(), 4, []
    for piece in pieces:
        scores.append(struct.unpack_from("<f", raw, at)[0])
        at += 8 + len(piece)
    tokens = ["<unk>", "<s>", "</s>", *(piece.decode().replace(" ", "▁") for piece in pieces[3:])]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    vocabulary = Vocabulary(tokens, types, scores=scores)
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    tokenizer = LibraryTokenizer(vocabulary.build(), **names, add_bos=True, vocabulary=vocabulary)
    return model.to(torch.float32).eval().requires_grad_(False), tokenizer


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Return llama-server's options, as far as they mean something here."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    texts = ("host", "alias", "hf-repo", "hf-file", "api-key", "chat-template", "chat-template-file")
    for name in (*texts, "mcp-servers-config", "mcp-servers-json"):
        parser.add_argument(f"--{name}")
    for name, default in (("port", 8080), ("ctx-size", 0), ("parallel", 1), ("n-predict", 0), ("seed", -1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temp", type=float, default=0.8)
    parser.add_argument("--no-ui", action="store_true")
    return parser.parse_known_args(arguments)[0]


def serve(options: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    """Serve as the options say, until a signal arrives."""
    from herd.engine.engine import Engine
    from herd.engine.loop import EngineLoop
    from herd.serve.app import create_app
    from herd.serve.chat import ServedModel
    from herd.serve.keys import KeyPolicy, create_key
    from herd.serve.run import HerdServer
    from herd.serve.server_tools import ServerTools
    from herd.serve.settings import ServeSettings
    from herd.serve.store import Store
    from herd.tools.mcp_servers import McpServers, read_server_file

    names = (options.alias or "stories260K").split(",")
    context = min(
        (options.ctx_size or model.config.max_context) // options.parallel, model.config.max_context
    )
    sampling: dict[str, Any] = {"temperature": options.temp, "seed": max(options.seed, 0)}
    if options.n_predict > 0:
        sampling["max_tokens"] = options.n_predict
    loop = EngineLoop(Engine(model, tokenizer, max_batch=options.parallel, max_context=context))
    served = ServedModel(
        min(names), loop, tokenizer.with_settings(chat_template=template(options)), context,
        frozenset({*names, "*"}), sampling, facts={"file": FILE}, fingerprint="b-herd",
        parallel=options.parallel,
    )  # fmt: skip
    settings = ServeSettings(drain_seconds=0, has_page=not options.no_ui)
    store, token = None, None
    if options.api_key:
        store = Store(Path(tempfile.mkdtemp()) / "keys.db")
        token = create_key(store, "tests", KeyPolicy(), actor="shim")[1]
    entries = {}
    if options.mcp_servers_json is not None:
        options.mcp_servers_config = Path(tempfile.mkdtemp()) / "mcp.json"
        options.mcp_servers_config.write_text(options.mcp_servers_json)
    if options.mcp_servers_config is not None:
        entries = read_server_file(Path(options.mcp_servers_config))
    with McpServers(entries) as servers:
        tools = ServerTools(["calculator"], servers)
        model_served = served if options.hf_repo in OURS else replace(served, is_base=True)
        app = create_app(model_served, store, settings, tools)
        server = HerdServer(app, settings, options.port)
        keys = (options.api_key, token)
        server.config.app = Translated(app, keys, Tools(tools, server))
        server.run()


def template(options: argparse.Namespace) -> str:
    """Return the chat template that the options name."""
    if options.chat_template_file:
        return Path(options.chat_template_file).read_text(encoding="utf-8")
    if options.chat_template in BUILT_IN:
        return BUILT_IN[options.chat_template]
    known = {"llama3": "meta-llama-Llama-3.1-8B-Instruct"}.get(options.chat_template)
    if known:
        return Path(f"../../../models/templates/{known}.jinja").read_text(encoding="utf-8")
    return str(options.chat_template)


async def read_body(receive: Any) -> bytes:
    """Return the body of a request."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message.get("more_body"):
            break
    return body


class Tools:
    """llama.cpp's ``/tools``: lists the tools of the server, and calls one."""

    def __init__(self, tools: Any, server: Any) -> None:
        self._tools, self._server = tools, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        from starlette.responses import JSONResponse

        named = {tool.name: tool for group in self._tools.groups.values() for tool in group}
        if scope["method"] == "GET":
            body: Any = [
                {"tool": tool.name, "definition": {"type": "function", "function": tool.schema}}
                for tool in named.values()
            ]
        else:
            asked = json.loads(await read_body(receive))
            tool = named.get(asked["tool"])
            body = await self._call(tool, asked.get("params", {})) if tool else {"error": "unknown tool"}
        await JSONResponse(body)(scope, receive, send)

    async def _call(self, tool: Any, arguments: Any) -> dict[str, str]:
        """Run a tool, or give up when the server stops."""
        calling = asyncio.ensure_future(self._tools.call(tool, json.dumps(arguments)))
        while not calling.done():
            await asyncio.wait([calling], timeout=0.1)
            if self._server.should_exit:
                calling.cancel()
                return {"error": "the server stops"}
        outcome = calling.result()
        return {"plain_text_response" if outcome.ok else "error": outcome.text}


class Translated:
    """The application behind llama.cpp's key and its ``/tools``."""

    def __init__(self, app: Any, keys: tuple[str | None, str | None], tools: Tools) -> None:
        self._app, self._keys, self._tools = app, dict[bytes, bytes](), tools
        their_key, our_key = keys
        if their_key and our_key:
            self._keys = {
                their_key.encode(): our_key.encode(),
                f"Bearer {their_key}".encode(): f"Bearer {our_key}".encode(),
            }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Translate the key and the paths that mean something else in Herd."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = scope | {
            "headers": [(name, self._keys.get(value, value)) for name, value in scope["headers"]]
        }
        if scope["path"] == "/tools":
            await self._tools(scope, receive, send)
            return
        if scope["path"] == "/completions":  # OpenAI's API in Herd, another name of /completion there
            scope |= {"path": "/completion", "raw_path": b"/completion"}
        await self._app(scope, receive, send)


if __name__ == "__main__":
    serve_requests(sys.argv[1], Path(sys.argv[2]))
