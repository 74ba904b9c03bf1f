"""Prompts are lm-eval's, string by string, on real items; so are golds and stop strings."""

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install llamaherd[evals]")

import lmeval_oracle as oracle

from herd.evals.tasks import Rank

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
