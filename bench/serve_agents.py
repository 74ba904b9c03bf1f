"""Let real agents work through `herd serve`: two turns each, with tools, and an exact bill.

    python bench/serve_agents.py [--agents codex langchain …] [--gateway] [--commit]

The server has a real engine, cache and scheduler. Its model is random with two layers, and each answer is forced,
token by token, to a script: call tools in the first turn, say DONE when the results are there. Each agent gets a key
of its own that may use its API only. The agents are installed from npm and PyPI on the first run; they talk to
this machine alone. Needs node and npm, and Meta's tokenizer in HERD_TEST_DATA.

``--gateway``: the agents ask `herd serve --upstream` before that server, and the gateway has the keys and the ledger.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from common import DATA, ROOT, WORK, bench_parser, exactly, save_receipt
from herd.engine import Engine
from herd.engine.constraint import Constraint
from herd.engine.loop import EngineLoop, Generation
from herd.engine.request import Request
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.report.receipt import Value
from herd.serve.chat import ServedModel
from herd.serve.keys import KeyPolicy, create_key
from herd.serve.store import Store
from herd.serve.usage import read_usage
from herd.text import Tokenizer
from servers import gateway, serving

FOLDER = WORK / "agents"
NPM = {
    "codex": "@openai/codex@0.171.0",
    "claude": "@anthropic-ai/claude-code@2.1.197",
    "opencode": "opencode-ai@1.18.33",
}
CONTEXT = 65_536
SECONDS = 420
DONE = "All is DONE."
PROMPT = "Run the command that is needed, then say DONE."


@dataclass
class Agent:
    """An agent: the scope of its key, the first answer of the script, and how it is started.

    ``calls`` are (tool, arguments). Agents without tools get the text ``edit`` instead. ``start(url, token,
    folder)`` returns the command and its environment.
    """

    scope: str
    calls: Callable[[Path], list[tuple[str, dict[str, Any]]]]
    start: Callable[[str, str, Path], tuple[list[str], dict[str, str]]]
    edit: str = ""


@dataclass
class Script:
    """What a scripted engine has answered: tokens of each answer, and prompt tokens computed and in total."""

    answers: list[list[int]] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)


class ScriptedLoop(EngineLoop):
    """An engine loop with a random model whose answers are forced to a script.

    The script is: calls first, and DONE once results are in the prompt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128,
            rope_theta=500_000.0, max_context=CONTEXT, tie_embeddings=True,
        )  # fmt: skip
        self.script, self._tokenizer = Script(), tokenizer
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.edit = ""
        super().__init__(Engine(LlamaLM(config).init_weights(0, std=0.2).eval(), tokenizer))

    def answer_to(self, text: str) -> str:
        """Return the script's answer to a prompt."""
        if "out-of-the-tool" in text.rpartition(PROMPT)[2]:
            return DONE
        if PROMPT in text and all(name in text for name, _ in self.calls):
            return self.edit or calls_text(self.calls)
        return "A title"

    def submit(self, request: Request, n: int = 1) -> list[Generation]:
        """Queue a request with the script's next answer as its only possible one."""
        ids = self._tokenizer.encode(self.answer_to(self._tokenizer.decode(request.prompt_ids)))
        grammar = "start: " + " ".join(f"<[{id_}]>" for id_ in ids)
        generations = super().submit(replace(request, constraint=Constraint.lark(grammar)), n)
        self.script.answers += [ids] * n
        self.script.generations += generations
        return generations


def calls_text(calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Return calls as the model writes them."""
    return "; ".join(
        json.dumps({"type": "function", "name": name, "parameters": arguments}) for name, arguments in calls
    )


def codex(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    home = folder / "codex"
    home.mkdir()
    (home / "config.toml").write_text(
        'model = "tiny"\nmodel_provider = "herd"\n[model_providers.herd]\nname = "herd"\n'
        f'base_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "HERD_KEY"\n'
    )
    command = ["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", PROMPT]
    return command, {"CODEX_HOME": str(home), "HERD_KEY": token}


def claude(url: str, token: str, _: Path) -> tuple[list[str], dict[str, str]]:
    environment = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": token,
        "ANTHROPIC_MODEL": "tiny",
        "ANTHROPIC_SMALL_FAST_MODEL": "tiny",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return ["claude", "-p", PROMPT, "--allowedTools", "Bash"], environment


def opencode(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{url}/v1", "apiKey": token},
        "models": {"tiny": {"name": "tiny", "limit": {"context": CONTEXT, "output": 4096}}},
    }
    config = {"provider": {"herd": provider}, "model": "herd/tiny", "share": "disabled", "autoupdate": False}
    (folder / "opencode.json").write_text(json.dumps(config))
    return ["opencode", "run", "--model", "herd/tiny", PROMPT], {}


SHELL = """
import os, subprocess, sys
url, key, manual = os.environ["HERD_URL"], os.environ["HERD_KEY"], open(os.environ["HERD_MANUAL"]).read()

def shell(command: str) -> str:
    "Run a command."
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout
"""
PROGRAMS = {
    "openai-agents": """
import asyncio
from openai import AsyncOpenAI
from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
set_tracing_disabled(True)
model = OpenAIResponsesModel("tiny", AsyncOpenAI(base_url=url, api_key=key))
agent = Agent(name="a", instructions=manual, tools=[function_tool(shell)], model=model)
print(asyncio.run(Runner.run(agent, sys.argv[1])).final_output)
""",
    "langchain": """
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model="tiny", base_url=url, api_key=key, streaming=True)
agent = create_agent(model, tools=[shell], system_prompt=manual)
print(agent.invoke({"messages": [("user", sys.argv[1])]})["messages"][-1].content)
""",
    "pydantic-ai": """
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key=key))
print(Agent(model, instructions=manual, tools=[shell]).run_sync(sys.argv[1]).output)
""",
    "llm": """
import pathlib
import llm
folder = llm.user_dir()
folder.mkdir(parents=True, exist_ok=True)
entry = f"- model_id: tiny\\n  model_name: tiny\\n  api_base: {url}\\n  api_key_name: herd\\n  supports_tools: true\\n"
pathlib.Path(folder, "extra-openai-models.yaml").write_text(entry)
chain = llm.get_model("tiny").chain(sys.argv[1], system=manual, tools=[shell], key=key)
print(chain.text())
""",
}
"""Agents that are a few lines of Python with the package of that name."""
PYPI = {name: [name] for name in PROGRAMS} | {
    "langchain": ["langchain", "langchain-openai"],
    "pydantic-ai": ["pydantic-ai-slim[openai]"],
}


def program(name: str) -> Callable[[str, str, Path], tuple[list[str], dict[str, str]]]:
    """Return how one of `PROGRAMS` is started."""

    def start(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
        (folder / "agent.py").write_text(SHELL + PROGRAMS[name])
        (folder / "manual.md").write_text(instructions())
        environment = {
            "HERD_URL": f"{url}/v1", "HERD_KEY": token, "HERD_MANUAL": str(folder / "manual.md")
        }  # fmt: skip
        return [str(FOLDER / "venv" / "bin" / "python"), str(folder / "agent.py"), PROMPT], environment

    return start


def instructions() -> str:
    """Return a system message of a usual length, for agents that have none of their own."""
    return "You run commands in this project.\n\n" + (ROOT / "docs" / "architecture.md").read_text()


def append(folder: Path, number: int = 1) -> str:
    """Return a shell command that leaves one line per run and prints the marker of a result."""
    return f"echo ran >> {folder}/ran{number}; echo out-of-the-tool {number}"


AGENTS = {
    "codex": Agent("responses", lambda folder: [("exec_command", {"cmd": append(folder)})], codex),
    "claude": Agent(
        "messages",
        lambda folder: [("Bash", {"command": append(folder, n), "description": "run"}) for n in (1, 2)],
        claude,
    ),
    "opencode": Agent(
        "chat", lambda folder: [("bash", {"command": append(folder), "description": "run"})], opencode
    ),
    **{
        name: Agent(
            "responses" if name == "openai-agents" else "chat",
            lambda folder: [("shell", {"command": append(folder)})],
            program(name),
        )
        for name in PROGRAMS
    },
}


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS))
    parser.add_argument("--gateway", action="store_true", help="ask through herd serve --upstream")
    args = parser.parse_args()
    install_npm({name: NPM[name] for name in args.agents if name in NPM})
    install_python("venv", [package for name in args.agents for package in PYPI.get(name, ())])
    option, receipt = (" --upstream", "serve-gateway-agents") if args.gateway else ("", "serve-agents")
    what = (
        f"Coding agents through herd serve{option}: a random model forced to a script, two turns, a key each"
    )
    agents = {name: AGENTS[name] for name in args.agents}
    good = visit_all(agents, receipt, what, through_gateway=args.gateway)
    sys.exit(0 if good else 1)


def visit_all(
    agents: Mapping[str, Agent], receipt: str, what: str, *, through_gateway: bool = False, **more: Any
) -> bool:
    """Run agents, write a receipt, and return whether all finished."""
    torch.set_num_threads(2)
    tokenizer = Tokenizer.from_file(DATA / "llama3_tokenizer" / "tokenizer.model")
    values: dict[str, Value | tuple[Any, str]] = {}
    finished = []
    for name, agent in agents.items():
        found = visit(name, agent, tokenizer, through_gateway=through_gateway)
        good = found.pop("finished")
        finished.append(good)
        values |= {f"{name}: {key}": value for key, value in found.items()}
    values = {"agents that finished": exactly(len(finished), sum(finished), "agents")} | values
    save_receipt(receipt, what=what, values=values, **more)
    return all(finished)


def visit(name: str, agent: Agent, tokenizer: Tokenizer, *, through_gateway: bool) -> dict[str, Any]:
    """Run one agent against a new server, or a gateway before it, and return what came of it."""
    loop = ScriptedLoop(tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loop.calls, loop.edit = agent.calls(folder), agent.edit
        store = Store(folder / "serve.db")
        policy = KeyPolicy(scopes=frozenset({agent.scope, "models", "tokenize"}))
        key, token = create_key(store, name, policy, actor="bench")
        with ExitStack() as stack:
            served = ServedModel("tiny", loop, tokenizer, CONTEXT, frozenset({"*"}))
            url = stack.enter_context(serving(served, None if through_gateway else store))
            if through_gateway:
                url = stack.enter_context(gateway(f"{folder}/serve.db", url))
            command, environment = agent.start(url, token, folder)
            output, status = run(command, environment, folder)
        rows = [row for row in read_usage(store) if row.key_id == key.id]
        store.close()
        ran = [
            len((folder / f"ran{number}").read_text().split()) if (folder / f"ran{number}").exists() else 0
            for number in range(1, max(1, len(loop.calls)) + 1)
        ]
    script = loop.script
    scripted = sum(len(ids) for ids in script.answers)
    billed = sum(row.completion_tokens for row in rows)
    turns = [g.usage for g in script.generations if g.usage.prompt_tokens > 0 and g.request.prompt_ids]
    longest = sorted(turns, key=lambda usage: usage.prompt_tokens)[-2:]
    computed = [usage.prompt_tokens - usage.cached_tokens for usage in longest]
    again = 100 * computed[1] / max(1, longest[0].prompt_tokens) if len(longest) == 2 else 100.0
    reuse = Value(round(again, 2), "%", bar="≤ 3", passed=again <= 3)
    if agent.edit:  # it rewrites its prompt, because the files in it have changed
        reuse = Value(round(again, 2), "%")
    good = status == 0 and "DONE" in output and ran == [1] * len(ran) and billed == scripted
    good = good and reuse.passed is not False
    if not good:
        prompts = [(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) for usage in turns]
        print(
            f"--- {name}: exit {status}, (prompt, cached, completion) {prompts}\n{output[-4000:]}\n---",
            flush=True,
        )
    return {
        "finished": good,
        "runs of each tool": Value(
            ", ".join(map(str, ran)), "runs", bar="1 each", passed=ran == [1] * len(ran)
        ),
        "tokens billed": exactly(scripted, billed, "tokens"),
        "requests": (len(script.answers), "requests"),
        "tokens of the first prompt": (longest[0].prompt_tokens if longest else 0, "tokens"),
        "of it computed again in the second turn": reuse,
    }


def run(command: list[str], environment: dict[str, str], folder: Path) -> tuple[str, int]:
    """Run an agent in ``folder`` with a home of its own, and return its output and its exit status."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    path = f"{FOLDER / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}"
    more = {
        "HOME": str(home),
        "PWD": str(folder),
        "PATH": path,
        "XDG_CONFIG_HOME": str(home / ".config"),
        "CI": "1",
    }
    try:
        done = subprocess.run(
            command, env={**os.environ, **more, **environment}, cwd=folder, timeout=SECONDS, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return str(error.stdout or ""), 124
    return done.stdout, done.returncode


def install_npm(packages: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Install the packages of the programs that are not there yet."""
    wanted = [
        package
        for name, package in packages.items()
        if not (folder / "node_modules" / ".bin" / name).exists()
    ]
    if wanted:
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm") or sys.exit("npm is needed to install the agents")
        subprocess.run([npm, "install", "--no-audit", "--no-fund", *wanted], cwd=folder, check=True)


def install_python(venv: str, packages: Sequence[str]) -> None:
    """Install packages into a virtual environment in `FOLDER`."""
    python = FOLDER / venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / venv], check=True)
    if packages:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)


if __name__ == "__main__":
    main()
