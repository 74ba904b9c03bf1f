"""Every command that the documentation shows exists, with the options shown."""

import re
from pathlib import Path

import pytest

from herd import cli
from herd.checkpoint.catalogue import find_name

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown_commands(text: str) -> list[tuple[str, list[str]]]:
    """Return verb and further words of every ``herd VERB …`` on a page."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"(?<![\w/.])herd ([a-z]+)\b([^\n`#]*)", text)
    return [(verb, rest.replace(")", " ").split()) for verb, rest in found if verb in cli.VERBS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_exist_with_their_options(page: Path) -> None:
    for verb, words in shown_commands(page.read_text(encoding="utf-8")):
        command = cli.load_verb(verb)
        group = getattr(command, "commands", {})
        if words and words[0] in group:
            command = group[words[0]]
        elif verb != "plan" and "run" in group:
            command = group["run"]
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        shown = {word for word in words if re.fullmatch(r"--?[a-z][a-z0-9-]*", word)}
        assert shown <= known | {"--help"}, f"{page.name}: herd {verb} {' '.join(words)}"


def test_the_pages_show_commands() -> None:
    shown = [command for page in PAGES for command in shown_commands(page.read_text(encoding="utf-8"))]
    assert len(shown) > 100


def test_examples_that_change_weights_take_originals() -> None:
    for page in PAGES:
        for verb, words in shown_commands(page.read_text(encoding="utf-8")):
            named = [entry[1] for word in words if (entry := find_name(word))]
            if verb in ("quantize", "shrink", "tune"):
                assert not any(entry.source.endswith(".gguf") for entry in named), (
                    f"{page.name}: herd {verb} {words}"
                )


def test_nobody_is_told_to_install_what_is_not_published() -> None:
    for path in [*PAGES, *(ROOT / "src").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install .?llamaherd|git clone <", text), path


def test_the_service_units_keep_store_and_kernels_where_they_may_write() -> None:
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    unit, image = re.findall(r"```(?:ini|dockerfile)\n(.*?)```", page, re.DOTALL)
    assert "ProtectSystem=strict" in unit
    state = re.search(r"StateDirectory=(\w+)", unit)[1]  # type: ignore[index]
    for variable in ("HERD_STORE", "HERD_CACHE"):
        assert re.search(rf"^Environment={variable}=/var/lib/{state}/", unit, re.MULTILINE)
        assert re.search(rf"^ENV .*{variable}=/data/", image, re.MULTILINE)
    assert ":/data herd" in page
