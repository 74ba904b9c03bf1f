"""Claims about the leak: figures compared with published ones, and the verb without torch or weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from herd.cli import VERBS, run
from herd.plan import leak, prices, shard_files
from herd.plan.leak import TONES, claims_page

ROOT = Path(__file__).parents[2]
CLAIMS = {claim.key: claim for claim in leak.all_claims()}


def test_computed_sizes_of_405b_match_metas_published_files():
    # 0.05 %: the shards carry a little more than weights.
    computed = shard_files.computed_405b()
    assert set(computed) == set(shard_files.PUBLISHED_405B)
    for name, shards in shard_files.PUBLISHED_405B.items():
        assert computed[name] == pytest.approx(shards.nbytes, rel=0.0005), name


def test_figures_quoted_in_the_news_are_reproduced():
    assert CLAIMS["820-gb"].values["mp16_bytes"] == 2 * 410_081_247_232
    assert CLAIMS["three-times"].values["llama2_bf16_bytes"] == 2 * 68_976_648_192  # as released
    hours = CLAIMS["gpu-hours"].values
    assert hours["years"] == pytest.approx(3_520, rel=0.001)
    assert hours["gpus_for_a_month"] == pytest.approx(43_000, rel=0.01)
    assert hours["usd"] == 1.72e9
    assert 0.1 < hours["desktop_tokens_per_s"] < 1.3  # 307 GB/s over 229 GB at the very best
    assert CLAIMS["three-times"].values["llama2_fp32_bytes"] == pytest.approx(280e9, rel=0.02)


def test_instruct_models_are_compared_with_instruct_models():
    values = CLAIMS["8b-near-70b"].values
    assert (
        values["old_8b_instruct"]
        < values["new_8b_instruct"]
        < values["old_70b_base"]
        < values["old_70b_instruct"]
    )
    jump = CLAIMS["code-and-truth"].values
    assert jump["humaneval_70B_new"] < jump["humaneval_70B_old"]
    assert jump["truthfulqa_mc1_70B_new"] == jump["truthfulqa_mc1_70B_old"]


def test_wins_equal_a_count_by_hand():
    assert leak.wins("Llama 3.1 405B", "GPT-4o", rival_source="azure-leak") == (10, 13)
    assert leak.wins("Llama 3.1 405B", "GPT-4o") == (4, 13)
    tasks = leak.wins("Llama 3.1 405B", "Claude 3.5 Sonnet", source="paper-t2")[1]
    assert tasks == 14  # 16, without one in another setting and one that has no score


def test_the_tokenizer_reproduces_the_committed_word_table(real_data):
    from herd.package_yaml import package_yaml
    from herd.text import Tokenizer

    tokenizer = Tokenizer.from_file(real_data("llama3_tokenizer") / "tokenizer.model")
    table = package_yaml("herd.plan", "words.yaml")["udhr"]
    for code, space in (("en", " "), ("hi", " "), ("ja", "")):
        lines = (real_data("udhr") / f"{code}.txt").read_text(encoding="utf-8").splitlines()
        count = sum(len(tokenizer.encode(space + line.strip())) for line in lines if line.strip())
        assert count == table["languages"][code]["tokens"], code


def test_blended_prices_equal_those_of_artificial_analysis():
    assert min(price.blended for price in prices.offers_for("Claude 3.5 Sonnet")) == 6.00
    azure = next(price for price in prices.offers_for("Llama 3.1 405B") if price.host == "Azure")
    assert azure.blended == pytest.approx(8.00, abs=0.005)
    assert all(price.source and price.date for price in prices.all_offers())


def test_break_even_equals_a_sum_by_hand():
    """USD 1 an hour fixed, 0.5 more at work, 1,000 tokens/s: a month's 730.5 hours cost 730.5 USD. A million
    tokens cost 0.139 USD of energy, so each million saves the rest of the price."""
    own = prices.own_cost(1000.0, 1000.0, 1.0, 1.5)
    assert own.blended == pytest.approx(1.5 / 3.6)
    api = prices.ApiPrice("m", "h", 2.0, 2.0, "2024", "s")
    even = prices.break_even(own, api)
    assert even.tokens == pytest.approx(730.5 / (2 - 0.5 / 3.6) * 1e6)
    assert even.capacity == pytest.approx(730.5 * 3.6e6)
    assert even.reachable
    cheap = prices.ApiPrice("m", "h", 0.1, 0.1, "2024", "s")
    assert prices.break_even(own, cheap).tokens is None


def test_every_claim_has_arithmetic_sources_and_a_command():
    assert len(CLAIMS) == 10
    for claim in CLAIMS.values():
        assert claim.verdict in TONES
        assert claim.arithmetic
        assert claim.sources
        assert claim.values
        program, argument = claim.see.split()[:2]
        assert argument in VERBS if program == "herd" else (ROOT / argument).is_file()
    html = claims_page(list(CLAIMS.values()))
    assert html.count("<article") == 10
    assert "http" not in html.replace("<!doctype html>", "")  # nothing to load


def test_leak_prints_lines_of_at_most_80_columns(capsys):
    assert run(["plan", "leak"]) == 0
    text = capsys.readouterr().out
    assert "\033" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("See:") == 10


def test_leak_needs_no_torch_and_prints_json():
    code = "import sys; from herd.cli import run; run(['plan', 'leak', '--json']); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [claim["key"] for claim in json.loads(done.stdout)] == list(CLAIMS)
