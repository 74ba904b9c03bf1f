"""The tools of `herd serve` and of keys on the command line."""

import json

import pytest
from typer.testing import CliRunner

from herd.cli.keys import app
from herd.cli.serve_tools import choose_tools
from herd.errors import ConfigError


def test_keys_have_tools_and_show_them(tmp_path):
    def run(*words):
        return CliRunner().invoke(app, [*words, "--store", str(tmp_path / "serve.db")])

    assert run("create", "alice", "--tools", "calculator,python", "--tools", "files").exit_code == 0
    assert "tools calculator, files, python" in run("list").stdout
    (shown,) = json.loads(run("list", "--json").stdout)
    assert sorted(shown["policy"]["tools"]) == ["calculator", "files", "python"]
    assert run("create", "bob", "--tools", "a b").exit_code != 0
    assert run("change", "alice").exit_code != 0
    assert "tools" in run("change", "alice", "--tools", "a b").stderr
    assert run("change", "alice", "--budget", "9 tokens/day").exit_code == 0
    changed = run("change", "alice", "--tools", "").stdout
    assert "9 tokens/day" in changed
    assert "tools" not in changed.partition(":")[2].replace("tokens", "")


def test_chosen_tools_are_checked_before_anything_starts(tmp_path):
    file = tmp_path / "mcp.json"
    file.write_text('{"mcpServers": {"files": {"command": "no-such-program"}}}')
    chosen = choose_tools("calculator, python", file)
    assert chosen.builtin == ("calculator", "python")
    assert list(chosen.servers) == ["files"]
    with pytest.raises(ConfigError, match="calculator, python"):
        choose_tools("shell", None)
    with pytest.raises(ConfigError, match=r"mcp\.json"):
        choose_tools("", tmp_path / "no" / "mcp.json")
    tools = chosen.open()
    assert set(tools.groups) == {"calculator", "python"}  # the log says that the server did not start
    tools.close()
