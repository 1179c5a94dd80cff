"""The header reader believes nothing: what lies is refused, what is accepted lies where it says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from flctl.errors import AggregationRefused
from flctl.model.header import HEADER_LIMIT, INDEX_LIMIT, ITEMSIZE, TENSOR_LIMIT, tensors_of
from flctl.model.shards import Reader, open_shards
from tests.checkpoints import NUMPY, data_of, header_of, random_values, raw_file, write_weights

TWO = {
    "a": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "b": ("BF16", np.arange(4, dtype=np.uint16)),
}
DATA = data_of(TWO)
Header = dict[str, Any]


def changed(change: Callable[[Header], Any]) -> Header:
    header = header_of(TWO)
    change(header)
    return header


def entry(**values: Any) -> Callable[[Header], Any]:
    return lambda header: header["b"].update(values)


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


LIES = {
    "overlap": (changed(entry(data_offsets=[16, 24])), "overlaps"),
    "hole": (changed(entry(data_offsets=[28, 36])), "hole"),
    "first_not_at_zero": (changed(lambda h: h.pop("a")), "hole"),
    "past_the_end": (changed(entry(shape=[40], data_offsets=[24, 104])), "truncated"),
    "backwards": (changed(entry(data_offsets=[32, 24])), "data_offsets"),
    "negative_offset": (changed(entry(data_offsets=[-8, 0])), "data_offsets"),
    "three_offsets": (changed(entry(data_offsets=[24, 32, 40])), "data_offsets"),
    "offset_beyond_64_bits": (changed(entry(data_offsets=[24, 1 << 70])), "data_offsets"),
    "float_offset": (changed(entry(data_offsets=[24.0, 32.0])), "data_offsets"),
    "negative_shape": (changed(entry(shape=[-4])), "shape"),
    "two_negatives": (changed(entry(shape=[-2, -2])), "shape"),
    "true_as_shape": (changed(entry(shape=[True, 4])), "shape"),
    "text_as_shape": (changed(entry(shape="4")), "shape"),
    "product_overflows_64_bits": (changed(entry(shape=[1 << 33, 1 << 31, 2])), "needs"),
    "wrong_size": (changed(entry(shape=[5])), "needs 10 bytes and has 8"),
    "rank": (changed(entry(shape=[1] * 65 + [4])), "shape"),
    "unknown_dtype": (changed(entry(dtype="F128")), "dtype"),
    "packed_dtype": (changed(entry(dtype="F4")), "dtype"),
    "dtype_is_no_text": (changed(entry(dtype=["F32"])), "dtype"),
    "unknown_key": (changed(entry(more=1)), "must have dtype, shape and data_offsets"),
    "missing_key": (changed(lambda h: h["b"].pop("dtype")), "must have dtype"),
    "entry_is_a_list": (changed(lambda h: h.update(b=[1])), "must have dtype"),
    "empty_name": (changed(lambda h: h.update({"": h.pop("b")})), "cannot be a tensor's name"),
    "name_with_newline": (changed(lambda h: h.update({"b\n": h.pop("b")})), "cannot be a tensor's name"),
    "name_too_long": (changed(lambda h: h.update({"b" * 2000: h.pop("b")})), "cannot be a tensor's name"),
    "name_that_is_no_unicode": (changed(lambda h: h.update({"\udcff": h.pop("b")})), "cannot be a tensor's name"),
    "metadata_of_numbers": (changed(lambda h: h.update(__metadata__={"format": 1})), "__metadata__"),
    "metadata_is_a_list": (changed(lambda h: h.update(__metadata__=[])), "__metadata__"),
    "too_long_for_its_header": (changed(lambda h: h.pop("b")), "longer than its header says"),
    "no_json": ("{nonsense", "not JSON"),
    "no_object": ("[1, 2]", "no JSON object"),
    "leading_space": (" {}", "no JSON object"),
    "no_unicode": (b'{"\xff": 1}', "not JSON"),
    "nested_too_deeply": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "number_of_10000_digits": (changed(entry(shape=[10**2000])), r"shape: \[Infinity\]"),
    "duplicate_tensor": ('{"a":%s,"a":%s}' % ((json.dumps(header_of(TWO)["a"]),) * 2), "'a' appears twice"),
    "duplicate_key": (
        '{"a":{"dtype":"F32","dtype":"I32","shape":[2,3],"data_offsets":[0,24]}}',
        "'dtype' appears twice",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused_with_file_and_reason(case: str, tmp_path: Path) -> None:
    header, reason = LIES[case]
    folder = write(tmp_path, raw_file(header, DATA))
    with pytest.raises(AggregationRefused, match=reason) as refusal:
        open_shards(folder, site="brno")
    assert str(folder / "model.safetensors") in refusal.value.message
    assert refusal.value.site == "brno"
    assert len(refusal.value.message) < 1000


def test_the_header_that_the_lies_are_made_from_is_accepted(tmp_path: Path) -> None:
    assert list(open_shards(write(tmp_path, raw_file(header_of(TWO), DATA))).tensors) == ["a", "b"]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = raw_file(header_of(TWO), DATA)
    for size in range(len(whole)):
        with pytest.raises(AggregationRefused, match="truncated"):
            open_shards(write(tmp_path, whole[:size]))
    with pytest.raises(AggregationRefused, match="longer than its header says"):
        open_shards(write(tmp_path, whole + b"\0"))


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 100_000_001, (1 << 64) - 1])
def test_a_huge_header_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    folder = write(tmp_path, length.to_bytes(8, "little") + b"{}")
    os.truncate(folder / "model.safetensors", 1 << 30)
    with pytest.raises(AggregationRefused, match="too long"):
        open_shards(folder)


def test_more_tensors_than_the_limit_are_refused() -> None:
    item = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(item % number for number in range(TENSOR_LIMIT + 1)) + "}").encode()
    with pytest.raises(ValueError, match="more than"):
        tensors_of(text, file="x", size=8 + len(text))


def test_tensors_without_elements_and_scalars_are_fine(tmp_path: Path) -> None:
    tensors = {
        "empty": ("F32", np.zeros((0, 1 << 40), np.float32)),
        "scalar": ("F64", np.array(2.0)),
        "empty2": ("U8", np.zeros((3, 0), np.uint8)),
    }
    shards = open_shards(write_weights(tmp_path, tensors))
    assert {name: (tensor.shape, tensor.count) for name, tensor in shards.tensors.items()} == {
        "empty": ((0, 1 << 40), 0),
        "scalar": ((), 1),
        "empty2": ((3, 0), 0),
    }


def test_every_dtype_has_the_size_that_numpy_gives_it() -> None:
    for dtype, kind in NUMPY.items():
        assert ITEMSIZE[dtype] == np.dtype(kind).itemsize


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F128"]),
        "shape": st.lists(st.integers(-1, 4) | st.just(1 << 62), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2),
    }
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entries, max_size=3),
    size=st.integers(0, 40),
)
@example(header=header_of(TWO), size=len(DATA))
def test_what_we_accept_the_safetensors_library_reads_alike(tmp_path: Path, header: Header, size: int) -> None:
    folder = write(tmp_path, raw_file(header, bytes(size)))
    try:
        ours = open_shards(folder)
    except AggregationRefused:
        return
    with safe_open(folder / "model.safetensors", "numpy") as theirs:
        assert set(theirs.keys()) == set(ours.tensors)
        for name, tensor in ours.tensors.items():
            assert theirs.get_slice(name).get_shape() == list(tensor.shape)
            assert theirs.get_slice(name).get_dtype() == tensor.dtype


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_still_whole_and_nothing_else_happens(
    tmp_path: Path, places: list[tuple[int, int]]
) -> None:
    content = bytearray(raw_file(header_of(TWO, {"format": "pt"}), DATA))
    for place, value in places:
        content[place % len(content)] = value
    folder = write(tmp_path, bytes(content))
    try:
        shards = open_shards(folder)
    except AggregationRefused:
        return
    try:
        with safe_open(folder / "model.safetensors", "numpy") as theirs:
            assert set(theirs.keys()) == set(shards.tensors)
    except SafetensorError as error:
        pytest.fail(f"accepted by us, refused by safetensors: {error}")


def sharded(folder: Path) -> Path:
    return write_weights(folder, TWO, {"a": "1", "b": "2"})


def reindex(folder: Path, weight_map: Any) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "model-1.safetensors", "b": "../model-2.safetensors"}, "no safetensors file of this folder"),
        ({"a": "/etc/passwd", "b": "model-2.safetensors"}, "no safetensors file of this folder"),
        ({"a": "model-1.safetensors", "b": "pytorch_model.bin"}, "no safetensors file of this folder"),
        ({"a": "model-1.safetensors", "b": 2}, "no safetensors file of this folder"),
        ({"a": "model-1.safetensors", "b": "model-3.safetensors"}, "No such file"),
        ({"a": "model-2.safetensors", "b": "model-1.safetensors"}, "tensor 'a' is not in model-2"),
        ({"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}, "tensor 'c' is not in"),
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, reason: str, tmp_path: Path) -> None:
    folder = reindex(sharded(tmp_path), weight_map)
    with pytest.raises(AggregationRefused, match=reason):
        open_shards(folder)


def test_a_file_that_the_index_does_not_name_is_no_part_of_the_model(tmp_path: Path) -> None:
    assert list(open_shards(reindex(sharded(tmp_path), {"a": "model-1.safetensors"})).tensors) == ["a"]


def test_a_tensor_that_the_index_leaves_out_of_its_shard_is_refused(tmp_path: Path) -> None:
    folder = reindex(write_weights(tmp_path, TWO, {"a": "1", "b": "1"}), {"a": "model-1.safetensors"})
    with pytest.raises(AggregationRefused, match=r"'b' of model-1\.safetensors is not listed"):
        open_shards(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model-2.safetensors").write_bytes(raw_file(header_of(TWO), DATA))
    with pytest.raises(AggregationRefused, match=r"is in model-1\.safetensors as well"):
        open_shards(folder)


def test_one_file_and_an_index_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AggregationRefused, match="exclude each other"):
        open_shards(write_weights(sharded(tmp_path), TWO))


def test_an_index_that_is_too_long_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    os.truncate(folder / "model.safetensors.index.json", INDEX_LIMIT + 1)
    with pytest.raises(AggregationRefused, match="too many"):
        open_shards(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AggregationRefused, match=r"no model\.safetensors"):
        open_shards(tmp_path)


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(AggregationRefused, match="not a regular file"):
        open_shards(tmp_path)


def test_chunks_of_any_size_give_the_bytes_of_the_tensor(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {f"t{number}": ("I16", random_values("I16", (7, 11), rng)) for number in range(4)}
    shards = open_shards(write_weights(tmp_path, tensors, {"t0": "2", "t1": "1", "t2": "2", "t3": "1"}))
    for chunk in (1, 3, 77, 1000):
        with Reader(shards) as reader:
            for name, (_, array) in tensors.items():
                found = b""
                for start, count in shards.tensors[name].pieces(chunk):
                    buffer = bytearray(count * 2)
                    reader.read(shards.tensors[name], start, memoryview(buffer))
                    found += buffer
                assert found == array.tobytes()


def test_a_reader_keeps_one_file_open_whatever_the_number_of_shards(tmp_path: Path) -> None:
    tensors = {f"t{number:03}": ("U8", np.zeros(4, np.uint8)) for number in range(100)}
    shards = open_shards(write_weights(tmp_path, tensors, {name: name for name in tensors}))
    before = len(os.listdir("/proc/self/fd"))
    with Reader(shards) as reader:
        for tensor in shards.tensors.values():
            reader.read(tensor, 0, memoryview(bytearray(4)))
            assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_shrinks_after_its_check_is_refused_by_the_read(tmp_path: Path) -> None:
    shards = open_shards(write(tmp_path, raw_file(header_of(TWO), DATA)))
    os.truncate(tmp_path / "model.safetensors", shards.size - 1)
    with Reader(shards) as reader, pytest.raises(AggregationRefused, match="truncated"):
        reader.read(shards.tensors["b"], 0, memoryview(bytearray(8)))


def test_looking_at_a_model_does_not_load_torch() -> None:
    ours = "shards", "manifest", "folder", "verify", "draft"
    heavy = "torch", "safetensors", "numpy", "transformers", "pickle"
    code = "import sys; " + "; ".join(f"import flctl.model.{name}" for name in ours)
    code += f"; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
