"""Programs that no model should write, as answers to tasks whose answers are run."""

from pathlib import Path

from herd.evals.tasks import Answer, Task

PROGRAMS = {
    "ten megabytes in a line": "print('x' * 10_000_000)",
    "ten megabytes of program": "#" * 10_000_000,
    "NUL": "x = 1\n\x00\x00",
    "half a character": "x = '\ud800'",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "processes": "import subprocess\nsubprocess.run(['sleep', '60'])",
    "endless loop": "while True: pass",
    "endless memory": "x = []\nwhile True: x.append('x' * 10**6)",
    "writes a file": "open('{target}', 'w').write('x')",
    "deletes a file": "import os\nos.remove('{victim}')",
    "reads the system": "print(open('/etc/passwd').read())",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "leaves early": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "deep recursion": "def f(n): return f(n + 1)\nf(0)",
    "closes its output": "import os\nos.close(1)\nos.close(2)",
}


def answers(task: Task, target: Path, victim: Path, port: int) -> dict[str, Answer]:
    """Every program as the task takes one. It writes ``target``, deletes ``victim``, calls ``port``."""
    texts = {name: text.format(target=target, victim=victim, port=port) if "{" in text else text
             for name, text in PROGRAMS.items()}  # fmt: skip
    if task.mode == "instruct":
        return {name: Answer(f"```python\n{text}\n```") for name, text in texts.items()}
    body = (
        "    return 1\n\n" if task.name == "human_eval" else ""
    )  # there the answer goes on within the function
    return {name: Answer(body + text) for name, text in texts.items()}
