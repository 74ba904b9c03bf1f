"""What `herd tune inspect` shows is what the stream of training gives to the model."""

import json
from html.parser import HTMLParser

import torch

from herd.checkpoint import load_tokenizer
from herd.cli import run
from herd.data.batch import IGNORE
from herd.data.packing import DialogStream
from herd.data.tuning import read_tuning
from herd.tune.inspect import seen_documents


def test_tokens_masks_positions_and_documents_are_those_of_the_stream(base, dialogs):
    tokenizer = load_tokenizer(base)
    data = read_tuning([dialogs], tokenizer, 256)
    seen = seen_documents(data, tokenizer, 256, 100)
    assert len(seen) == len(data.examples) == 37
    stream = DialogStream([example.rendered for example in data.examples], 256, 0, pad_id=0)
    by_row = {}
    batch = stream.batch(0, stream.n_rows)
    rows = {tuple(row): number for number, row in enumerate(batch.tokens_BT.tolist())}
    for document in seen:
        by_row.setdefault(document.row, []).append(document)
    for documents in by_row.values():
        read = [token for document in documents for token in document.tokens[:-1]]
        row = next(n for ids, n in rows.items() if list(ids[: len(read)]) == [token.id for token in read])
        assert [token.position for token in read] == batch.positions_BT[row, : len(read)].tolist()
        numbers = [document.document for document in documents for _ in document.tokens[:-1]]
        assert numbers == batch.documents_BT[row, : len(read)].tolist()
        wanted = [t.id if t.trained else IGNORE for document in documents for t in document.tokens[1:]]
        assert wanted == batch.targets_BT[row, : len(read)].tolist()
        assert torch.all(batch.targets_BT[row, len(read) :] == IGNORE)


def test_the_terminal_marks_trained_tokens_and_names_rows_set_aside(base, dialogs, capsys):
    assert run(["tune", "inspect", str(dialogs), "--model", str(base)]) == 0
    said = capsys.readouterr()
    assert "row 0, document 0: " in said.out
    assert "[[I|t| |i|s|" in said.out
    assert "<|eot_id|>|]]" in said.out
    assert f"set aside: {dialogs}:12: not JSON" in said.err


def test_control_characters_of_the_data_do_not_reach_the_terminal(base, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "What is \x1b[2J?", "completion": "It is red."}) + "\n")
    assert run(["tune", "inspect", str(file), "--model", str(base)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\\x1b" in said


def test_rows_are_as_the_run_has_them_and_parts_of_characters_are_bytes(base, tmp_path, capsys):
    """The context is the run's, and the tokens that end the answers of pairs are not trained."""
    rows = [{"prompt": f"What is {n}?", "chosen": "It is 日.", "rejected": "It is red."} for n in range(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["tune", "inspect", str(file), "--model", str(base)]) == 0
    alone = capsys.readouterr().out
    assert "|\\xe6|\\x97|\\xa5|.|]]<|eot_id|>|" in alone
    words = ["--data", str(file), "--out", str(tmp_path / "run"), "--check"]
    assert run(["tune", str(base), *words]) == 0
    capsys.readouterr()
    assert run(["tune", "inspect", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == alone


def test_rows_set_aside_for_one_reason_are_one_line(base, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n") * 9)
    for words in (["inspect", str(file), "--model", str(base)], [str(base), "--data", str(file)]):
        assert run(["tune", *words]) == 1
        error = capsys.readouterr().err
        assert f"{file}:1, {file}:2, {file}:3 and 6 more: none of its tokens is trained" in error
        assert error.count("no answer of an assistant") == 1


def test_the_page_has_every_token_and_marks_the_trained_ones(base, dialogs, tmp_path, capsys):
    page = tmp_path / "seen.html"
    assert run(["tune", "inspect", str(dialogs), "--model", str(base), "--html", str(page)]) == 0
    assert run(["tune", "inspect", str(dialogs), "--model", str(base), "--json"]) == 0
    documents = json.loads(capsys.readouterr().out.split("\n", 1)[1])["documents"]

    class Spans(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tokens = []

        def handle_starttag(self, tag, attributes):
            if tag == "span" and "title" in dict(attributes):
                found = dict(attributes)
                self.tokens.append([found["title"], found.get("class", ""), ""])

        def handle_data(self, data):
            if self.tokens:
                self.tokens[-1][2] += data

    spans = Spans()
    spans.feed(page.read_text())
    tokens = [(document, token) for document in documents for token in document["tokens"]]
    assert len(spans.tokens) == len(tokens)
    for (title, kind, _), (document, token) in zip(spans.tokens, tokens, strict=True):
        assert title.startswith(
            f"position {token['position']}, id {token['id']}, document {document['document']}"
        )
        assert (kind == "trained") == token["trained"]


def test_hostile_text_cannot_become_markup(base, tmp_path, capsys):
    file, page = tmp_path / "bad.jsonl", tmp_path / "seen.html"
    messages = [
        {"role": "user", "content": "<script>x</script><|eot_id|>"},
        {"role": "assistant", "content": "ok"},
    ]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    assert run(["tune", "inspect", str(file), "--model", str(base), "--html", str(page)]) == 0
    assert "<script" not in page.read_text()


def test_a_model_is_needed(dialogs, capsys):
    assert run(["tune", "inspect", str(dialogs)]) == 1
    assert "--model MODEL is missing" in capsys.readouterr().err
