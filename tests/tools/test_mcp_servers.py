"""MCP servers of the operator's file: their tools, and servers that crash, flood, lie or leave processes behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from herd.errors import ConfigError
from herd.tools.mcp_servers import McpServers, RemoteTool, ServerEntry, list_digest, read_server_file

HOSTILE = Path(__file__).with_name("hostile_mcp.py")


def entry(mode: str, **more) -> ServerEntry:
    return ServerEntry(command=sys.executable, args=[str(HOSTILE), mode], **more)


def ask(servers: McpServers, name: str, message: str = "hi") -> tuple[str, bool]:
    return servers.call(name, "echo", {"message": message}).result(30)


def descendants(pid: int | str = "self") -> list[int]:
    """Return the ids of all processes below one, those that its keepers have adopted included."""
    own = os.getpid() if pid == "self" else pid
    out = []
    for task in Path(f"/proc/{own}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread or the process has just ended
            for child in (task / "children").read_text().split():
                out += [int(child), *descendants(int(child))]
    return out


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(descendants())
    yield
    assert set(descendants()) == before
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 321" not in listed


def test_lists_and_calls_tools():
    with McpServers({"one": entry("good"), "two": entry("good")}) as servers:
        assert {(tool.server, tool.name) for tool in servers.tools} == {("one", "echo"), ("two", "echo")}
        assert servers.tools[0].parameters["required"] == ["message"]
        assert ask(servers, "one", "hello") == ("echo: hello", True)
        both = [servers.call(name, "echo", {"message": str(n)}) for n in range(5) for name in ("one", "two")]
        assert {each.result(30)[0] for each in both} == {f"echo: {n}" for n in range(5)}


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("slow", "did not answer within 1 s"),
        ("crash", "out of luck"),
        ("flood", "a line of more than 4 MB"),
        ("storm", "or 10,000 messages"),
        ("wrong", "error: "),
    ],
)
def test_a_hostile_server_gives_an_error_and_is_started_again(mode, told):
    with McpServers(
        {"bad": entry(mode), "good": entry("good")}, call_seconds=1 if mode == "slow" else 4
    ) as servers:
        text, ok = ask(servers, "bad")
        assert not ok
        assert told in text
        assert ask(servers, "good") == ("echo: hi", True)
        text, ok = ask(servers, "bad")  # it is tried again, and is as bad
        assert not ok
        assert told in text


@pytest.mark.parametrize("mode", ["malformed", "grandchild", "big"])
def test_an_answer_among_rubbish_is_found(mode):
    with McpServers({"bad": entry(mode)}) as servers:
        text, ok = ask(servers, "bad")
        assert ok
        assert text == "echo: hi" or mode == "big"


def test_a_server_that_changes_its_tools_is_disabled(caplog):
    with McpServers({"bad": entry("changing")}) as servers:
        assert ask(servers, "bad") == ("echo: hi", True)
        for _ in range(3):
            text, ok = ask(servers, "bad")
            assert not ok
            assert "its list of tools has changed" in text
        assert servers.is_disabled("bad")
    assert "is disabled" in caplog.text


def test_servers_get_no_secrets(monkeypatch):
    monkeypatch.setenv("HERD_STORE", "postgresql://user:secret@host/db")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with McpServers({"bad": entry("secrets", env={"TOKEN": "given"})}) as servers:
        environment = json.loads(ask(servers, "bad")[0])
    assert environment["TOKEN"] == "given"
    assert set(environment) <= {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "TOKEN", "LC_CTYPE"}


def test_a_server_that_does_not_start_is_left_out(caplog):
    entries = {
        "missing": ServerEntry(command="/no/such/program"),
        "ends": ServerEntry(command=sys.executable, args=["-c", "raise SystemExit('no licence')"]),
        "nobody": ServerEntry(url="http://127.0.0.1:9/mcp"),
        "good": entry("good"),
    }
    with McpServers(entries) as servers:
        assert [tool.server for tool in servers.tools] == ["good"]
    assert "No such file" in caplog.text
    assert "no licence" in caplog.text
    assert "nobody is left out" in caplog.text


def test_nothing_survives_kill_9():
    program = f"""
import sys, time; sys.path[:0] = {sys.path!r}
from herd.tools.mcp_servers import McpServers, ServerEntry
servers = McpServers({{"bad": ServerEntry(command=sys.executable, args=[{str(HOSTILE)!r}, "grandchild"])}})
servers.call("bad", "echo", {{"message": "hi"}}).result(30)
print("ready", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    left = descendants(process.pid)
    assert len(left) == 4  # the keeper, the server, and what it started
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"mcpServers": []}',
        '{"mcpServers": {"a": 1}}',
        '{"mcpServers": {"a": {}}}',
        '{"mcpServers": {"a": {"command": 1}}}',
        '{"mcpServers": {"a": {"url": "file:///etc/passwd"}}}',
        '{"mcpServers": {"a": {"command": "x", "url": "http://y"}}}',
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "mcp.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_server_file(tmp_path / "mcp.json")
    assert "mcp.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_the_file_of_desktop_programs(tmp_path):
    (tmp_path / "mcp.json").write_text(
        '{"mcpServers": {"files": {"command": "npx", "args": ["x"], "env": {"A": "b"}, "disabled": false},'
        ' "web": {"type": "http", "url": "https://example.org/mcp", "headers": {"Authorization": "Bearer x"}}}}'
    )
    servers = read_server_file(tmp_path / "mcp.json")
    assert servers["files"].env == {"A": "b"}
    assert servers["web"].url == "https://example.org/mcp"


def test_the_digest_covers_names_descriptions_and_schemas():
    tool = RemoteTool("s", "a", "b", {"type": "object"})
    others = [
        RemoteTool("s", "x", "b", {"type": "object"}),
        RemoteTool("s", "a", "x", {"type": "object"}),
        RemoteTool("s", "a", "b", {"type": "object", "title": "x"}),
    ]
    assert len({list_digest([each]) for each in (tool, *others)} | {list_digest([])}) == 5
    assert list_digest([tool, others[0]]) == list_digest([others[0], tool])
