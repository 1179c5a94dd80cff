"""A fixed number of odd inputs to the readers of headers and indexes; without end: tests/fuzz_header.py."""

import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flctl.model.header import HEADER_LIMIT, INDEX_LIMIT, ITEMSIZE, VALUE_LIMIT, tensors_of, weight_map_of
from tests.fuzz_header import FITTED, FOLDER, INDEX, TOKENS, WHOLE, judge, mutated, valid

NAMES = st.sampled_from(["a", "b", "model.embed_tokens.weight", "ž", "__metadata__", "dtype"])
SIZES = st.integers(0, 5) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64])
ODD = st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Tensors one after the other in any order of their names, of which some values and some bytes are changed."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from([*ITEMSIZE, *ITEMSIZE, "F8_E4M3"])), draw(st.lists(SIZES, max_size=3))
        size = ITEMSIZE.get(dtype, 1)
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, st.text(max_size=3) | NAMES, max_size=3))
    for name in draw(st.sets(st.sampled_from(sorted(header)), max_size=1)) if header else ():
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        header[name] = draw(st.just({**header[name], key: draw(ODD)}) | ODD)
    order = draw(st.permutations(list(header)))
    text = json.dumps({name: header[name] for name in order}, indent=draw(st.sampled_from([None, 1])))
    return edited(draw, text.encode())


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    files = st.sampled_from(["model-1.safetensors", "model-2.safetensors", "../model-1.safetensors", "/etc/passwd", ""])
    weight_map = draw(st.dictionaries(NAMES, files | ODD, max_size=3) | ODD)
    whole = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = {"metadata": draw(ODD), "weight_map": draw(st.just(whole) | st.just(weight_map))}
    return edited(draw, json.dumps(index).encode())


def edited(draw: st.DrawFn, text: bytes) -> bytes:
    edits = st.tuples(st.integers(0, 400), st.integers(0, 9), st.sampled_from(TOKENS) | st.binary(max_size=2))
    for place, length, piece in draw(st.lists(edits, max_size=1)):
        text = text[: place % (len(text) + 1)] + piece + text[place % (len(text) + 1) + length :]
    return text


@settings(max_examples=2000, deadline=None)
@given(
    st.builds(lambda kind, text: bytes([kind]) + text, st.just(FITTED), headers())
    | st.builds(lambda kind, text: bytes([kind]) + text, st.sampled_from([INDEX, FOLDER]), indexes())
    | st.builds(
        lambda text, length, data: bytes([WHOLE]) + (len(text) + length).to_bytes(8, "little") + text + data,
        headers(),
        st.sampled_from([0, 0, 0, 1, 8, 2**40]),
        st.binary(max_size=40),
    )
)
@example(b"")
def test_whatever_is_accepted_the_safetensors_library_reads_alike(data: bytes) -> None:
    """Else ValueError or AggregationRefused, within a second and 100 MB: `judge` raises if not."""
    judge(data)


def test_the_inputs_that_the_fuzzer_begins_with_are_accepted() -> None:
    found = [judge(data) for data in valid()]
    assert set(found) == {"file accepted", "header accepted", "index accepted", "folder accepted"}


def test_the_fuzzers_own_mutator_breaks_nothing_in_2000_inputs() -> None:
    draw = random.Random(3)
    seen = [judge(mutated(draw.choice(valid()), draw)) for _ in range(2000)]
    assert sum(reason.endswith(" accepted") for reason in seen) > 100
    assert len(set(seen)) > 20


def entries(count: int) -> bytes:
    return b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))


# The costliest that the limits let through, and what no limit on the length would stop.
LARGE: dict[str, bytes] = {
    "tensors": b"{" + entries(49_999) + b"}",
    "more_tensors": b"{" + entries(50_001) + b"}",
    "empty_lists": b'{"a":[' + b"[]," * (VALUE_LIMIT // 2 - 10) + b"1]}",
    "empty_lists_to_the_limit": b'{"a":[' + b"[]," * (HEADER_LIMIT // 3 - 10) + b"1]}",
    "texts": b'{"a":[' + b'"ab",' * (VALUE_LIMIT - 10) + b"1]}",
    "texts_of_wide_letters": b'{"a":[' + b'"\\u1234",' * (VALUE_LIMIT - 20_000) + b"1]}",
    "keys": b'{"__metadata__":{' + b",".join(b'"%x":""' % number for number in range(VALUE_LIMIT // 3 - 10)) + b"}}",
    "more_keys": b'{"__metadata__":{' + b",".join(b'"%x":""' % number for number in range(700_000)) + b"}}",
    "one_wide_letter_among_many": b'{"__metadata__":{"a":"' + b"a" * 8_000_000 + "\U0001f600".encode() + b'"}}',
    "one_escaped_wide_letter": b'{"__metadata__":{"a":"' + b"a" * 8_000_000 + b'\\ud83d\\ude00"}}',
    "long_numbers": b'{"a":[' + (b"9" * 4300 + b",") * 1900 + b"1]}",
    "one_number": b'{"a":' + b"9" * 8_000_000 + b"}",
    "lists_in_lists": b'{"a":' + b"[" * 8_000_000,
    "tables_in_tables": b'{"a":' * 1_600_000,
    "some_tables_in_tables": b'{"a":' * 200_000,
    "spaces": b"{" + b" " * 8_000_000 + b"}",
    "one_name": b'{"' + b"a" * 8_000_000 + b'":1}',
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("reader", [lambda text: tensors_of(text, file="x", size=8 + len(text)), weight_map_of])
def test_no_header_and_no_index_takes_100_megabytes(reader: Callable[[bytes], object], case: str) -> None:
    text = LARGE[case]
    assert len(text) <= HEADER_LIMIT < INDEX_LIMIT
    tracemalloc.start()
    try:
        reader(text)
    except ValueError as error:
        assert len(str(error)) < 1000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100e6 - len(text)
