"""The section for a model card says what the summary says, and every name in it is text."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from recorded_run import HOSTILE

from monai_adv.errors import ConfigError
from monai_adv.studies.model_card import escape, model_card
from monai_adv.studies.units import read_json

EVIL = [
    HOSTILE, "``` \n# head", "a_b _c_ __d__", "&lt;b&gt; &amp;", r"\| back\\slash", "http://a.b www.c.d a@b.c <http://e.f>",
    "**bold** ~~gone~~ ![i](http://j.k)", "# head", "1. one", "- item", "<script>alert(1)</script>", "| --- |", "---",
]  # fmt: skip


@pytest.fixture
def summary(recorded: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(recorded / "summary.json")
    return found


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def kinds(text: str) -> set[str]:
    """Kinds of everything on the page."""
    return {t.type for token in parsed(text) for t in [token, *(token.children or [])]}


def cells(text: str) -> list[str]:
    """What table cells show."""
    tokens = parsed(text)
    return [
        "".join(child.content for child in tokens[i + 1].children or [])
        for i, token in enumerate(tokens)
        if token.type in ("th_open", "td_open")
    ]


@pytest.mark.parametrize("text", EVIL)
def test_escaped_text_shows_exactly_itself(text: str) -> None:
    page = f"- {escape(text)}\n\n| {escape(text)} | b |\n|---|---|\n| {escape(text)} | d |\n"
    shown = " ".join(text.split())
    inline = [token for token in parsed(page) if token.type == "inline"]
    assert ["".join(c.content for c in token.children or []) for token in inline] == [shown, shown, "b", shown, "d"]
    assert {c.type for token in inline for c in token.children or []} <= {"text", "text_special"}
    assert not re.search(r"\w://|www\.|\w@\w", escape(text))  # which GitHub makes links of


def test_the_section_of_a_real_run(summary: dict[str, Any]) -> None:
    card = model_card(summary)
    assert kinds(card).isdisjoint({"html_inline", "html_block", "link_open", "image", "s_open", "em_open", "hr"})
    table = cells(card)
    assert len(table) == 10 * (1 + 2 * 3)
    assert f"{HOSTILE} 0.8 std" in table or "noise 0.8 std" in table
    for row in summary["mean_dice"]:
        if row["attack"] == "clean":
            place = table.index(row["victim"])
            own = [
                table[i : i + 10]
                for i in range(10, len(table), 10)
                if table[i : i + 2] == [row["victim"], row["region"]]
            ]
            assert place > 0
            others = [r for r in summary["mean_dice"] if r["attack"] != "clean"]
            low = min(
                (r for r in others if (r["victim"], r["region"]) == (row["victim"], row["region"])),
                key=lambda r: r["dice"],
            )
            wanted = [row["victim"], row["region"], "2", f"{row['dice']:.3f}", "2", f"{low['dice']:.3f}"]
            assert own[0][:6] == wanted
            assert own[0][7:] == [low["setting"], "-", "n=2 < 6: no p-value"]
    assert "vulnerability under the threat model" in card
    assert "NOT ADAPTIVE - an upper bound on robustness only; the study lacks" in card
    assert not re.search(r"\b(is|are) robust\b|compliant", card)
    assert "- FAIL: every unit has a result" in card
    assert "Do not use" not in card  # which invalidates no other unit
    assert "units without a result: 4 skipped, 2 failed" in card
    assert "monai-adv run study.yaml" in card
    assert "BraTS2021_0" not in card  # no subject's name on a public page
    assert summary["provenance"]["fingerprint"] in card


def test_the_metadata_is_what_model_index_wants(summary: dict[str, Any]) -> None:
    block = re.search(r"^(`{3,})yaml\n(.*?)^\1$", model_card(summary), re.DOTALL | re.MULTILINE)
    assert block is not None
    models = yaml.safe_load(block[2])["model-index"]
    assert [m["name"] for m in models] == ["tiny", "filtered (NOT ADAPTIVE)"]
    metrics = models[0]["results"][0]["metrics"]
    clean = next(r for r in summary["mean_dice"] if r["attack"] == "clean")
    assert len(metrics) == 2 * 3
    assert metrics[0] == {
        "type": "dice",
        "name": f"mean Dice {clean['region']}, clean, n=2",
        "value": round(clean["dice"], 4),
    }
    assert set(models[0]["results"][0]) == {"task", "dataset", "metrics"}


def test_backticks_end_no_block(summary: dict[str, Any]) -> None:
    evil = copy.deepcopy(summary)
    evil["provenance"]["commands"] = ["```", "<b>", "````", "done"]
    evil["victims"][0]["label"] = "```\n# not a heading"
    for row in evil["mean_dice"]:
        row["victim"] = evil["victims"][0]["label"] if row["victim"] == "tiny" else row["victim"]
    card = model_card(evil)
    fences = [token for token in parsed(card) if token.type == "fence"]
    assert fences[0].content == "```\n<b>\n````\ndone\n"
    assert yaml.safe_load(fences[-1].content)["model-index"][0]["name"] == "```\n# not a heading"
    assert kinds(card) == kinds(model_card(summary))


def test_the_test_of_the_worst_setting_stands_beside_it(summary: dict[str, Any]) -> None:
    tested = copy.deepcopy(summary)
    for row in tested["comparisons"]["tiny"]:
        row |= {"p_holm": 0.04 if row["attack"] == HOSTILE else 0.5, "verdict": f"for {row['region']}"}
    del tested["comparisons"]["filtered (NOT ADAPTIVE)"]
    table = cells(model_card(tested))
    rows = [table[i : i + 10] for i in range(10, len(table), 10)]
    assert [row[8:] for row in rows[:3]] == [["0.04", f"for {row[1]}"] for row in rows[:3]]
    assert [row[8:] for row in rows[3:]] == [["-", "not compared"]] * 3


def test_a_failed_check_is_said_first(summary: dict[str, Any]) -> None:
    bad = {"name": "zero outside the | support", "status": "FAIL", "detail": "1 > 0", "victim": "tiny"}
    card = model_card({**summary, "checks": [*summary["checks"], bad]})
    shown = card.index("**Do not use these numbers: an automatic check failed (zero outside the &#124; support).**")
    assert shown < card.index("### Threat model")
    assert "- FAIL: zero outside the &#124; support (tiny): 1 &gt; 0" in card


def test_a_sound_run_has_no_warning_and_one_without_attacks_says_so(summary: dict[str, Any]) -> None:
    sound = copy.deepcopy(summary)
    sound |= {"checks": [c for c in summary["checks"] if c["status"] == "PASS"], "problems": []}
    sound["mean_dice"] = [r for r in summary["mean_dice"] if r["attack"] == "clean"]
    card = model_card(sound)
    assert "FAIL" not in card
    assert "Not scored" not in card
    assert cells(card).count("no attack has a result") == 6


def test_another_document_is_refused(summary: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="monai-adv report"):
        model_card({**summary, "schema": "urn:monai_adv:schema:summary:0"})
