"""Every MoE causal LM that the installed transformers has, in float64: what a new version broke shows here by name."""

import importlib.metadata
import re

import pytest
from architectures import CHECKS, FAILS, ROOT, TABLE, WHOLE_MODEL, build, found, reason, table

KINDS, _ = found()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return build(kind)


@pytest.mark.parametrize("part", CHECKS)
def test_architecture(kind, model, part, tmp_path):
    why_not = reason(kind, part)
    if why_not is None:
        CHECKS[part](kind, model, tmp_path / "files")
    else:  # a clear refusal; where it no longer comes, the table is to be put right
        with pytest.raises(ValueError, match="no fused mixture-of-experts layer|look like a router|does not give logits"):
            CHECKS[part](kind, model, tmp_path / "files")


def test_at_least_45_architectures_pass():
    assert len(set(KINDS) - set(FAILS)) >= 45


def test_the_papers_and_todays_models_are_among_them():
    named = {"qwen2_moe", "granitemoe", "olmoe", "qwen3_moe", "gpt_oss", "mixtral", "deepseek_v2", "deepseek_v3"}
    assert named <= set(KINDS) - set(FAILS)


def test_the_written_table_is_in_step():
    pins = (ROOT / "constraints.txt").read_text()
    installed = importlib.metadata.version("transformers")
    if installed != re.search(r"^transformers==(.+)$", pins, re.MULTILINE)[1]:
        pytest.skip(f"the table is of the pinned transformers, not of {installed}")
    assert set(FAILS) | set(WHOLE_MODEL) <= set(KINDS)
    assert TABLE.read_text(encoding="utf-8") == table(), "run: python tests/architectures.py"
