"""Graders: each by numbers worked out by hand, and what is refused before anything runs. No torch."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog import Catalog
from app.errors import Code, RunError
from app.grading import Sample
from workers.graders.number_match import number
from workers.graders.text_similarity import common
from workers.loading.formulas import Formula
from workers.loading.templates import fill

# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "answer", "filled"),
    [
        ("{{item.a}}", "x", "one"),
        ("<{{ item.a }}|{{item.a}}>", "x", "<one|one>"),
        ("{{item.deep.list[1].b}}", "x", "2"),
        ("{{item.deep.list.0}}", "x", "0.5"),
        ("{{item.flag}} {{item.deep}}", "x", 'true {"list": [0.5, {"b": 2}]}'),
        ("{{sample.output_text}}", "{{item.a}}", "{{item.a}}"),
        ("{{sample.output_json.n}}", '{"n": [1, "ü"]}', '[1, "ü"]'),
        ("{{item.sly}}", "x", "{{item.a}}"),
        ("{{item.größe}}", "x", "9"),
        ('no place at all: {"a": {"b": 1}}', "x", 'no place at all: {"a": {"b": 1}}'),
    ],
)
def test_a_template_is_filled_in_once_and_nothing_is_carried_out(template: str, answer: str, filled: str) -> None:
    item = {
        "a": "one",
        "deep": {"list": [0.5, {"b": 2}]},
        "flag": True,
        "sly": "{{item.a}}",
        "größe": 9,
    }
    assert fill(template, Sample(answer, item)) == filled


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{item}}", "no path"),
        ("{{answer}}", "no path"),
        ("{{item.a | upper}}", "no path"),
        ("{{item.a()}}", "no path"),
        ("{{item['a']}}", "no path"),
        ("{{ ''.__class__ }}", "no path"),
        ("{{sample.choices}}", "not known"),
        ("{{sample.output_text.x}}", "without parts"),
        ("{% if item.a %}x{% endif %}", "block of code"),
        ("{{item.a", "left open"),
    ],
)
def test_a_template_that_is_more_than_a_path_is_refused(catalog: Catalog, template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        catalog.graders["string_check"].spec.model_validate({"type": "string_check", "reference": template})


def test_an_answer_that_is_no_json_has_no_parts_and_scores_nothing(score: Any) -> None:
    asked = {"type": "string_check", "input": "{{sample.output_json.n}}", "reference": "", "operation": "ne"}
    assert score(asked, '{"n": 5}') == 1
    assert score(asked, "five") == score(asked, '{"m": 5}') == 0


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "answer", "expected"),
    [
        ("eq", "Paris", 1),
        ("eq", "Paris ", 0),
        ("eq", "paris", 0),
        ("ne", "paris", 1),
        ("ne", "Paris", 0),
        ("like", "It is Paris.", 1),
        ("like", "It is paris.", 0),
        ("ilike", "IT IS PARIS.", 1),
        ("ilike", "Pari", 0),
    ],
)
def test_string_check(score: Any, operation: str, answer: str, expected: float) -> None:
    assert score(
        {"type": "string_check", "reference": "{{item.city}}", "operation": operation}, answer, city="Paris"
    ) == (expected)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        # The longest common subsequence of kitten and sitting is "ittn": 2 · 4 / (6 + 7).
        ("fuzzy_match", "kitten", "sitting", 8 / 13),
        ("fuzzy_match", "", "", 1),
        ("fuzzy_match", "", "x", 0),
        ("fuzzy_match", "same", "same", 1),
        # Of 6, 5, 4, 3 n-grams 5, 3, 1, 0 match; from bigrams on one is added to both.
        ("bleu", "the cat sat on the mat", "the cat is on the mat", (5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25),
        # Two words of four: precisions 2/2 and (1 + 1)/(1 + 1), brevity exp(1 - 4/2).
        ("bleu", "the cat", "the cat sat down", math.exp(-1)),
        ("bleu", "a dog", "the cat", 0),
        ("bleu", "The cat!", "the cat", 1),
        ("gleu", "the cat sat on the mat", "the cat is on the mat", 9 / 18),
        # 3 n-grams, all of them among the reference's 4 + 3 + 2 + 1.
        ("gleu", "the cat", "the cat sat down", 3 / 10),
        ("rouge_1", "the cat sat on the mat", "the cat is on the mat", 5 / 6),
        ("rouge_2", "the cat sat on the mat", "the cat is on the mat", 3 / 5),
        ("rouge_3", "the cat sat on the mat", "the cat is on the mat", 1 / 4),
        ("rouge_4", "the cat sat on the mat", "the cat is on the mat", 0),
        ("rouge_5", "one two", "one two", 0),
        ("rouge_1", "the the the", "the cat", 2 * 1 / (3 + 2)),
        ("rouge_l", "the cat sat on the mat", "the cat is on the mat", 5 / 6),
        ("rouge_l", "mat the on", "on the mat", 2 * 1 / 6),
        # Each Chinese sign is a word: two of three.
        ("rouge_1", "北京市", "北京城", 2 / 3),
        ("rouge_1", "???", "!!!", 0),
    ],
)
def test_text_similarity(score: Any, metric: str, answer: str, reference: str, expected: float) -> None:
    asked = {"type": "text_similarity", "reference": "{{item.ref}}", "evaluation_metric": metric}
    assert score(asked, answer, ref=reference) == pytest.approx(expected, abs=1e-12)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_textbook(left: str, right: str) -> None:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, one in enumerate(left):
        for j, two in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if one == two else max(table[i][j + 1], table[i + 1][j])
    assert common(left, right) == table[-1][-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so she has 40.\n#### 42", 42),
        ("#### 1,234.50", 1234.5),
        ("#### -3 and no more 7", -3),
        ("#### 1 but then #### $2", 2),
        ("####", None),
        ("#### none of the 5", 5),
        ("the answer is 7.", 7),
        ("5-3", 3),
        ("5 - -3", -3),
        ("no number", None),
        ("about 1e3 or .5", 0.5),
        ("12,34", 34),
        ("10,000,000", 10_000_000),
    ],
)
def test_the_number_of_a_text(text: str, expected: float | None) -> None:
    found = number(text, "####")
    assert (None if found is None else float(found)) == expected


@pytest.mark.parametrize(
    ("more", "answer", "expected"),
    [
        ({}, "#### 72", 1),
        ({}, "#### 72.0", 1),
        ({}, "it is 72", 1),
        ({}, "72 first, #### 71", 0),
        ({}, "I do not know", 0),
        ({"need_marker": True}, "it is 72", 0),
        ({"need_marker": True}, "it is #### 72", 1),
        ({"tolerance": 0.5}, "72.5", 1),
        ({"tolerance": 0.5}, "72.51", 0),
        ({"marker": None}, "#### 71, no, 72", 1),
        ({"marker": "A:"}, "A: 72 of 100", 1),
    ],
)
def test_number_match(score: Any, more: dict[str, Any], answer: str, expected: float) -> None:
    assert score({"type": "number_match", **more}, answer, answer="48 + 24 = 72 clips.\n#### 72") == expected


def test_a_reference_without_a_number_is_a_fault_of_the_data(score: Any) -> None:
    with pytest.raises(RunError, match="no number in the reference 'many'") as caught:
        score({"type": "number_match"}, "5", answer="many")
    assert caught.value.code == Code.BAD_DATA


@pytest.mark.parametrize(
    ("more", "answer", "expected"),
    [
        ({"pattern": r"#### *-?\d+"}, "so\n#### 42", 1),
        ({"pattern": r"#### *-?\d+"}, "so 42", 0),
        ({"pattern": r"\d+", "full": True}, "42", 1),
        ({"pattern": r"\d+", "full": True}, "42.", 0),
        ({"pattern": "yes", "ignore_case": True}, "YES", 1),
        ({"pattern": r"\b{{item.key}}\b"}, "it costs a.b here", 1),
        ({"pattern": r"\b{{item.key}}\b"}, "it costs axb here", 0),
    ],
)
def test_regex(score: Any, more: dict[str, Any], answer: str, expected: float) -> None:
    assert score({"type": "regex", **more}, answer, key="a.b") == expected


def test_a_pattern_that_would_take_years_ends_the_run_within_seconds(score: Any) -> None:
    with pytest.raises(RunError, match="took more than 1 s") as caught:
        score({"type": "regex", "pattern": "(a|aa)+$"}, "a" * 60 + "b")
    assert caught.value.code == Code.BAD_SPEC


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        # 0.25 · 1 + 0.75 · 0
        ({"weights": {"right": 0.25, "brief": 0.75}}, 0.25),
        ({}, 0.5),
        ({"calculate_output": "2 * right - brief"}, 2),
        ({"calculate_output": "max(right, brief) ^ 2 + 2 * 3 ^ 2"}, 19),
        ({"calculate_output": "-right / 4 + sqrt(16) * min(1, 2, brief + 3)"}, 3.75),
        ({"calculate_output": "floor(right * 1.9) + ceil(brief + 0.1) + abs(-2) + exp(0) + log(1)"}, 5),
    ],
)
def test_multi(score: Any, more: dict[str, Any], expected: float) -> None:
    graders = {
        "right": {"type": "number_match"},
        "brief": {"type": "regex", "pattern": "^.{1,3}$"},
    }
    assert score({"type": "multi", "graders": graders, **more}, "#### 42", answer="42") == pytest.approx(expected)


@pytest.mark.parametrize("formula", ["1 / brief", "log(brief)", "10 ^ (10 ^ (right + 2))", "sqrt(brief - 1)"])
def test_a_formula_without_a_value_names_the_scores(score: Any, formula: str) -> None:
    graders = {"right": {"type": "number_match"}, "brief": {"type": "regex", "pattern": "^.$"}}
    asked = {"type": "multi", "graders": graders, "calculate_output": f"{formula} + 0 * (right + brief)"}
    with pytest.raises(RunError, match=r"right = 1, brief = 0"):
        score(asked, "#### 42", answer="42")


@given(st.text("ab+-*/^()., 19minxlogsqrt", max_size=30))
def test_no_formula_does_more_than_reckon(text: str) -> None:
    try:
        formula = Formula(text)
    except ValueError:
        return
    try:
        assert math.isfinite(formula(dict.fromkeys(formula.names, 0.5)))
    except (ArithmeticError, ValueError):
        return


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "string_check"}, "reference"),
        ({"type": "string_check", "reference": "x", "operation": "equals"}, "'eq', 'ne', 'like' or 'ilike'"),
        ({"type": "text_similarity", "reference": "x", "evaluation_metric": "cosine"}, "fuzzy_match"),
        ({"type": "regex", "pattern": "("}, "no regular expression"),
        ({"type": "regex", "pattern": ""}, "at least 1"),
        ({"type": "number_match", "tolerance": -1}, "greater than or equal to 0"),
        ({"type": "number_match", "name": "a/b"}, "name"),
        ({"type": "json_schema", "json_schema": {"type": "text"}}, "type .*is none of null"),
        ({"type": "json_schema", "json_schema": {"propertys": {}}}, "propertys is not known"),
        ({"type": "json_schema", "json_schema": {"$ref": "#/$defs/x"}}, "leads nowhere"),
        ({"type": "json_schema", "json_schema": {"$ref": "#"}}, "refers to itself"),
        ({"type": "json_schema", "json_schema": {"properties": {"a": {"minimum": "3"}}}}, "properties.a: minimum"),
        ({"type": "json_schema", "json_schema": {"pattern": "("}}, "no regular expression"),
        ({"type": "multi", "graders": {}}, "at least 1"),
        ({"type": "multi", "graders": {"a b": {"type": "number_match"}}}, "pattern"),
        ({"type": "multi", "graders": {"a": {"type": "multi"}}}, "does not match any of the expected tags"),
        ({"type": "multi", "graders": {"a": {"type": "number_match"}}, "weights": {"b": 1.0}}, "other graders"),
        ({"type": "multi", "graders": {"a": {"type": "number_match"}}, "calculate_output": "a + b"}, "names b"),
        ({"type": "multi", "graders": {"a": {"type": "number_match"}}, "calculate_output": "1"}, "does not use a"),
        ({"type": "multi", "graders": {"a": {"type": "number_match"}}, "calculate_output": "a.real"}, "may hold"),
        ({"type": "multi", "graders": {"a": {"type": "number_match"}}, "calculate_output": "open(a)"}, "no function"),
        ({"type": "multi", "graders": {"a": {"type": "number_match"}}, "calculate_output": "a +"}, "cannot be read"),
        ({"type": "multi", "graders": {"a": {"type": "number_match"}}, "calculate_output": "-" * 60 + "a"}, "deeper"),
    ],
)
def test_a_bad_grader_is_refused(catalog: Catalog, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        catalog.graders[spec["type"]].spec.model_validate(spec)
