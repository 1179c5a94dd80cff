"""What a site's record may be: JSON of a bounded size and depth, each key once, numbers; all else is no record."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flctl.campaign.remote_merge import _seconds
from flctl.campaign.testimony import DEEPEST, MOST, numbers_only, table_of
from flctl.cli.round import _score
from flctl.errors import ConfigurationError
from flctl.model.state import read_state
from flctl.records import Failure, Held, Job

HOSTILE = {
    "not JSON": "schema: 1",
    "an array": "[1]",
    "a word": '"done"',
    "nothing": "",
    "a byte order mark": "\ufeff{}",
    "cut off": '{"schema": 1, "token": "f',
    "something behind it": '{"schema": 1} {"schema": 2}',
    "a key twice": '{"outcome": "failed", "outcome": "done"}',
    "a key twice, deep within": '{"files": [{"path": "a", "path": "b"}]}',
    "a key twice, written differently": '{"a": 1, "\\u0061": 2}',
    "too deep": '{"a": ' + "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1) + "}",
    "deeper than any parser goes": '{"a": ' + "[" * 500_000 + "]" * 500_000 + "}",
    "tables, deeper than any parser goes": '{"a": ' * 150_000 + "1" + "}" * 150_000,
    "too long": json.dumps({"a": "x" * MOST}),
    "a number beyond all measure": '{"steps": ' + "9" * 5000 + "}",
    "a number of 19 digits": '{"steps": 1000000000000000000}',
    "a negative one": '{"steps": -100000000000000000000}',
    "hexadecimal": '{"steps": 0x10}',
    "a comment": '{"steps": 1} // x',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_record_is_none(name: str) -> None:
    assert table_of(HOSTILE[name]) is None


def test_a_record_is_read() -> None:
    data = {"schema": 1, "files": [{"path": "a", "size": 3}], "metrics": {"evaluation": {"base": {"loss": 1.5}}}}
    assert table_of(json.dumps(data)) == data


def test_what_json_has_no_number_for_is_null() -> None:
    assert table_of('{"a": NaN, "b": -Infinity, "c": 1e999, "d": -1e999, "e": 1e300}') == {
        **dict.fromkeys("abcd"),
        "e": 1e300,
    }


@given(
    st.text(max_size=300) | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps)
)
def test_nothing_but_a_table_is_ever_given(text: str) -> None:
    found = table_of(text)
    assert found is None or (isinstance(found, dict) and found == json.loads(text))


def test_metrics_are_numbers_and_short_plain_words() -> None:
    told: dict[str, Any] = {
        "loss": 1.5,
        "device": "cuda:0",
        "evaluation": {"base": {"perplexity": 7}, "quote": "Nel mezzo del cammin"},
        "text": "a sentence of the data",
        "list": ["a", "b"],
        "a key\nwith a line end": 1,
        "x" * 81: 1,
        "\x1b[31m": 1,
        "nothing": None,
    }
    kept = {"loss": 1.5, "device": "cuda:0", "evaluation": {"base": {"perplexity": 7}}}
    assert numbers_only(told) == kept


@pytest.mark.parametrize(
    "told", [{}, {"evaluation": 5}, {"evaluation": {"base": 5}}, {"evaluation": {"base": {"perplexity": "cuda:0"}}}]
)
def test_metrics_of_any_shape_are_shown_or_left_out(told: dict[str, Any]) -> None:
    assert _score(told, "base") is None
    assert [_seconds({"seconds": value}) for value in ("cuda:0", {}, [1], 2.5)] == [0.0, 0.0, 0.0, 2.5]
    assert _score({"evaluation": {"base": {"perplexity": 7}}}, "base") == 7.0


@pytest.mark.parametrize("step", ["1e999", "[" * 200_000, "{}", "NaN"])
def test_a_state_of_a_rule_that_no_rule_leaves_is_damaged(tmp_path: Path, step: str) -> None:
    (tmp_path / "state.json").write_text(f'{{"schema": 1, "rule": "r", "model": "m", "files": [], "step": {step}}}')
    with pytest.raises(ConfigurationError, match="damaged"):
        read_state(tmp_path)


def test_the_words_in_records_are_harmless() -> None:
    words = "\x1b]0;owned\x07a\x9b31m b\u202e\nc"
    job = Job(token="f", id=words, state=words, reason=words, never=words)
    assert {job.id, job.state, job.reason, job.never, Held(reason=words, since=0).reason} == {"a b c"}
    failure = Failure(code="x", exit_code=6, message=words, hint=words)
    assert failure.message == failure.hint == "a b \nc"
    assert len(Job(token="f", id="x" * 10_000).id or "") < 600
