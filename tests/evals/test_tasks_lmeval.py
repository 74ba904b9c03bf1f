"""Prompts are lm-eval's, string by string, on real items. So are golds and stop strings."""

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")

import lmeval_oracle as oracle
from gold import gold_answer

from herd.errors import DataError
from herd.evals.harness import run_task
from herd.evals.tasks import Answer, Data, Generate, Likelihood, Rank, Read, make_task
from herd.evals.tasks.lm_eval import LmEvalTask

NAMES = [*oracle.LEAK, "arc_challenge", "arc_easy", "mbpp"]


@pytest.mark.parametrize("name", NAMES)
def test_same_requests(real_data, name):
    folder = real_data("README.md").parent
    for theirs, _, items in oracle.pairs(name, folder, 20):
        asked = {doc: [instance.args for instance in some] for doc, some in oracle.instances(theirs).items()}
        assert len(asked) == len(items)
        for doc_id, item in enumerate(items):
            if isinstance(item.request, Rank):
                assert list(item.request.pairs) == asked[doc_id]
            else:
                [(prompt, settings)] = asked[doc_id]
                assert item.request.prompt == prompt
                assert list(item.request.stop) == settings["until"]
            gold = theirs.doc_to_target(theirs.test_docs()[doc_id])
            if name == "winogrande":  # lm-eval's target is the end of the sentence, and its text the gold
                gold = theirs.doc_to_text(theirs.test_docs()[doc_id])
            if isinstance(item.request, Rank):
                assert item.gold == gold


@pytest.mark.parametrize("name", ["boolq", "gsm8k", "winogrande"])
def test_lm_evals_own_tasks_run_on_herd(real_data, tmp_path, name):
    """The same judgements by lm-eval's metrics and by Herd's, and no difference in what is asked."""
    folder = real_data("README.md").parent
    inner, herd, items = next(oracle.pairs(name, folder, 12))
    theirs = LmEvalTask.around(inner, f"lm-eval:{name}")
    inner.build_all_requests = lambda **_: None  # built already, for twelve documents
    asked = theirs.items(Data())
    assert [item.request for item in asked][:12] == [_plain(item.request) for item in items]
    for mine, item in zip(items, asked, strict=True):
        for right in (True, False):
            answer = gold_answer(herd, mine, right)
            if name != "winogrande":  # whose target is a text, not a number
                assert theirs.judge(item, gold_answer(theirs, item, right)).value == right
            assert theirs.judge(item, answer).value == herd.judge(mine, answer).value == right

    class Model:
        name, hash, mode, precision = "m", "00" * 8, "base", "float32"

        def answer(self, requests):
            for number, request in enumerate(requests):
                many = len(request.pairs) if isinstance(request, Rank) else 0
                yield number, Answer("#### 3", "stop", tuple(Likelihood(-float(i)) for i in range(many)))

    row = run_task(Model(), theirs, Data(), tmp_path)
    assert (row.status, row.n_items) == ("done", 12)


def _plain(request):
    if isinstance(request, Generate):  # lm-eval has its own limit
        return Generate(request.prompt, 256, request.stop)
    return request


@pytest.mark.soak  # lm-eval reads its thousands of task files first
def test_lm_evals_unknown_tasks_say_so():
    with pytest.raises(DataError, match="lm-eval:no_such_task: lm-eval cannot make it"):
        make_task("lm-eval:no_such_task")


def test_texts_read_by_lm_eval():
    from herd.evals.tasks.lm_eval import _request

    class Instance:
        request_type, args = "loglikelihood_rolling", ("some text",)

    assert _request("x", [Instance()]) == Read("some text")
    Instance.request_type = "paint"
    with pytest.raises(DataError, match="unknown kind of request 'paint'"):
        _request("x", [Instance()])
