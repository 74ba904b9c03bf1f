"""The dialog reader: every common format gives the same messages. What it cannot read is named by line."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import zstandard

from herd.data.dialogs import make_dialogs, training_texts
from herd.data.read_dialogs import read_dialogs, rendered_dialogs
from herd.data.text_files import DataWarning
from herd.errors import DataError
from herd.text import Tokenizer, render

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
ASKED = [{"role": "system", "content": "Be short"}, *HI]
TOOL = {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(training_texts(make_dialogs(50, 0)), 600)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def messages_of(path: Path) -> list:
    return [dialog.messages for dialog in read_dialogs(path)]


SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
TURNS = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("tool", "tool"),
]


@pytest.mark.parametrize(
    "row, expected, said",
    [
        (SHAREGPT, HI, "ShareGPT"),
        (SHAREGPT | {"system": "Be short"}, ASKED, "ShareGPT"),
        ({"conversations": [{"from": m["role"], "content": m["content"]} for m in HI]}, HI, "ShareGPT"),
        ({"messages": [{"role": m["role"], "value": m["content"]} for m in HI]}, HI, "ShareGPT"),
        (
            {"conversations": [{"from": "system", "value": "Be short"}, *SHAREGPT["conversations"]]},
            ASKED,
            "ShareGPT",
        ),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, HI, "Alpaca"),
        ({"instruction": "Hi", "output": "Yo", "system": "Be short"}, ASKED, "Alpaca"),
        (
            {"instruction": "Hi", "input": "there", "output": "Yo"},
            [{"role": "user", "content": "Hi\n\nthere"}, HI[1]],
            "Alpaca",
        ),
        ({"instruction": "Hi", "output": "Yo", "history": [["Hi", "Yo"]]}, HI + HI, "Alpaca"),
        ({"prompt": "Hi", "completion": "Yo"}, HI, "prompt and completion"),
        ({"prompt": "Hi", "response": "Yo"}, HI, "prompt and completion"),
    ],
)
def test_other_formats_are_converted_and_said(tmp_path: Path, row: dict, expected: list, said: str) -> None:
    path = write(tmp_path / "d.jsonl", row)
    with pytest.warns(DataWarning, match=f"converted 1 dialogs from {said}"):
        assert messages_of(path) == [expected]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HI},
        HI,
        {"conversations": HI},
        {"messages": json.dumps(HI)},
        {"messages": HI, "tools": None, "date": None},
    ],
)
def test_chat_messages_need_no_conversion(tmp_path: Path, row: object, recwarn) -> None:
    assert messages_of(write(tmp_path / "d.jsonl", row)) == [HI]
    assert not recwarn


@pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")
@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_dialogs(tmp_path: Path, ending: str, pack: str) -> None:
    rows = [{"instruction": f'Say "{n}",\nplease', "input": "", "output": str(n)} for n in range(5)]
    path = tmp_path / f"d{ending}"
    if ending == ".jsonl":
        write(path, *rows)
    elif ending == ".json":
        path.write_text("\ufeff" + json.dumps(rows))
    elif ending == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        if pack:
            pytest.skip("Parquet files are compressed inside")
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    packed = path.with_name(path.name + pack)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[pack]
    packed.write_bytes(compress(path.read_bytes()))
    found = messages_of(packed)
    assert [(m[0]["content"], m[1]["content"]) for m in found] == [
        (r["instruction"], r["output"]) for r in rows
    ]


def test_an_answer_of_weight_0_is_read_but_not_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [HI[0], {**HI[1], "weight": 0}, HI[0], {**HI[1], "weight": 1}]
    (rendered,) = rendered_dialogs(write(tmp_path / "d.jsonl", {"messages": messages}), tokenizer)
    whole = render(HI + HI, tokenizer)
    assert rendered.ids == whole.ids
    assert sum(rendered.mask) == sum(whole.mask) // 2
    first, second = (span for span in whole.spans if span.role == "assistant")
    assert not any(rendered.mask[first.start : first.end])
    assert rendered.mask[second.start : second.end] == whole.mask[second.start : second.end]


def test_dialogs_without_weight_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        {"messages": HI, "weight": 0},
        {"messages": [HI[0], {**HI[1], "weight": 0}]},
        {"messages": HI},
    )
    with pytest.warns(DataWarning, match="left out 2 dialogs whose answers all have weight 0"):
        assert messages_of(path) == [HI]


def test_dialogs_without_an_answer_are_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "d.jsonl", {"messages": HI[:1]}, {"messages": HI}, [HI[0], HI[0]])
    with pytest.warns(DataWarning, match="left out 2 dialogs without an answer"):
        (rendered,) = rendered_dialogs(path, tokenizer)
    assert rendered.ids == render(HI, tokenizer).ids


def test_a_system_message_beside_the_messages_is_theirs(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"messages": HI, "system": "Be short"})
    assert messages_of(path) == [ASKED]
    path = write(tmp_path / "d.jsonl", {"messages": ASKED, "system": "Be long"})
    with pytest.warns(DataWarning, match=r"ignored unknown fields: system \(1 times\)"):
        assert messages_of(path) == [ASKED]


def test_only_the_completion_of_a_prompt_with_messages_is_trained(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": [*HI, HI[0]], "completion": [HI[1]]})
    with pytest.warns(DataWarning, match="converted"):
        (rendered,) = rendered_dialogs(path, tokenizer)
    assert rendered.ids == render(HI + HI, tokenizer).ids
    assert sum(rendered.mask) == sum(render(HI, tokenizer).mask)


def test_fields_that_are_not_understood_are_named_in_one_warning(tmp_path: Path) -> None:
    rows = [{"messages": HI, "id": n, "source": "x"} for n in range(3)]
    rows.append({"messages": [HI[0], {**HI[1], "thought": "hm", "refusal": None}]})
    with pytest.warns(DataWarning) as seen:
        assert len(messages_of(write(tmp_path / "d.jsonl", *rows))) == 4
    assert [str(w.message).partition("fields: ")[2] for w in seen] == [
        "id (3 times), messages.thought (1 times), source (3 times)"
    ]


@pytest.mark.parametrize("result", ["2", {"sum": 2}, [1, 2], [], 2, True])
def test_tools_and_calls_of_other_formats_reach_the_renderer(
    tmp_path: Path, tokenizer: Tokenizer, result: object
) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    openai = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rest = [{"role": "tool", "content": result, "tool_call_id": "1"}, {"role": "assistant", "content": "2"}]
    asked = {"role": "assistant", "content": None, "tool_calls": [openai]}
    path = write(
        tmp_path / "d.jsonl", {"messages": [HI[0], asked, *rest], "tools": [TOOL], "date": "1 May 2024"}
    )
    (one,) = rendered_dialogs(path, tokenizer)
    turns = [("human", "Hi"), ("function_call", json.dumps(call)), ("observation", result), ("gpt", "2")]
    sharegpt = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    path = write(tmp_path / "s.jsonl", sharegpt | {"tools": json.dumps([TOOL]), "date": "1 May 2024"})
    with pytest.warns(DataWarning, match="ShareGPT"):
        (other,) = rendered_dialogs(path, tokenizer)
    text = result if isinstance(result, str) else json.dumps(result)
    truth = render(
        [HI[0], {"role": "assistant", "content": "", "tool_calls": [call]}, rest[0] | {"content": text}, rest[1]],
        tokenizer, tools=[TOOL], date="1 May 2024",
    )  # fmt: skip
    assert one.ids == other.ids == truth.ids
    assert one.mask == other.mask == truth.mask


@pytest.mark.parametrize(
    "line, match",
    [
        ("nonsense", "not JSON"),
        ("[]", "empty"),
        ("5", "int instead of an object"),
        ('{"messages": []}', "empty"),
        ('{"message": 1}', "no dialog among"),
        ('{"text": "running text"}', "no dialog among"),
        ('{"messages": [{"role": "x", "content": ""}]}', "role 'x'"),
        ('{"messages": "hello"}', "not JSON"),
        ('{"messages": {"role": "user"}}', "dict; give a list"),
        ('{"messages": ["hello"]}', r"messages\[0\] is str"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "weight 0.5 is neither"),
        ('{"conversations": [{"from": "nobody", "value": "a"}]}', "from='nobody'"),
        ('{"conversations": [{"from": "gpt"}]}', "has no value"),
        ('{"instruction": "a", "output": "b", "history": [1]}', "history is not a list"),
        ('{"chosen": [], "rejected": []}', "pair of preferences"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "lone surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "["}', "tools: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: str, match: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": HI}) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=rf"d\.jsonl:3.*{match}") as error:
        list(rendered_dialogs(path, tokenizer))
    assert "\n" not in str(error.value)


def test_lines_of_json_in_a_json_file_may_hold_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    line = json.dumps({"messages": [HI[0], {**HI[1], "content": "a\u2028b\x85c"}]}, ensure_ascii=False)
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert [messages[1]["content"] for messages in messages_of(path)] == ["a\u2028b\x85c"] * 2


def test_other_encodings_are_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    line = json.dumps({"messages": HI}) + "\n"
    path.write_bytes(line.encode() + '{"messages": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=f"not UTF-8 at byte {len(line) + 14}"):
        messages_of(path)
    path.write_bytes(line.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16, not UTF-8 at byte 0"):
        messages_of(path)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert messages_of(path) == [HI]


def test_files_without_dialogs_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="empty file"):
        messages_of(path)
    path.write_text("")
    with pytest.raises(DataError, match="empty file"):
        messages_of(path)
    with pytest.raises(DataError, match="no such file"):
        messages_of(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        messages_of(tmp_path)
