"""`flctl partition`: each record goes to one client, as many as the method's formula says, the same everywhere."""

import hashlib
import json
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flctl.dataset.draws import dirichlet, exactly, stream, whole
from flctl.dataset.methods import ByClass, Dirichlet, DualDirichlet, Method, divide
from flctl.dataset.partition import client_names, plan, write
from flctl.errors import ConfigurationError, UsageError

LABELS = ("contradiction", "entailment", "neutral")
ALPHAS = st.sampled_from([Decimal(text) for text in ("1e-6", "0.01", "0.5", "1", "7", "1e6")])
METHODS = st.one_of(
    st.builds(DualDirichlet, alpha_size=ALPHAS, alpha_class=ALPHAS),
    st.builds(Dirichlet, alpha=ALPHAS),
    st.just(ByClass(least=1, most=1)),
)


def records(folder: Path, count: int = 300, name: str = "data.jsonl") -> Path:
    path = folder / name
    lines = [
        json.dumps({"id": number, "label": LABELS[number % 7 % 3], "text": "è" * (number % 5)})
        for number in range(count)
    ]
    path.write_text("\n".join(lines))  # the last line has no end
    return path


def made(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def flctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flctl.cli.main", "partition", *words], capture_output=True, text=True, timeout=60
    )


@given(method=METHODS, classes=st.lists(st.integers(1, 10**9), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=80)
def test_every_record_of_every_class_goes_to_one_client(method: Method, classes: list[int], seed: int) -> None:
    counts = divide(method, classes, 6, seed)
    assert [sum(column) for column in zip(*counts, strict=True)] == classes
    assert min(min(row) for row in counts) >= 0
    assert counts == divide(method, classes, 6, seed)


@given(total=st.integers(0, 10**6), weights=st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any))
def test_the_largest_remainder_rounds_each_quota_down_or_up(total: int, weights: list[int]) -> None:
    with exactly():
        parts = whole(total, [Decimal(weight) for weight in weights])
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1
        assert weight or not part


@pytest.mark.parametrize(("alpha_size", "alpha_class"), [("4", "0.5"), ("8", "2"), ("0.1", "100")])
def test_dual_dirichlet_is_the_formula_of_the_paper(alpha_size: str, alpha_class: str) -> None:
    """c_j a_i b_ij / sum_m a_m b_mj in numpy, from the same draws."""
    classes, clients, seed = [700, 20, 3000, 111], 5, 3
    made = divide(
        DualDirichlet(alpha_size=Decimal(alpha_size), alpha_class=Decimal(alpha_class)), classes, clients, seed
    )
    with exactly():
        sizes = dirichlet([Decimal(alpha_size) / clients] * clients, stream(seed, "sizes"))
        mix = [Decimal(alpha_class) * count / sum(classes) for count in classes]
        mixes = [dirichlet(mix, stream(seed, "mix", client)) for client in range(clients)]
    a, b, c = numpy.array(sizes, float), numpy.array(mixes, float), numpy.array(classes, float)
    assert a.sum() == pytest.approx(1) and b.sum(axis=1) == pytest.approx(1)
    expected = c * a[:, None] * b / (a @ b)
    assert numpy.abs(numpy.array(made) - expected).max() < 1


@pytest.mark.parametrize("total", [0.05, 1.0, 30.0])
def test_the_draws_have_the_dirichlet_distributions_mean_and_variance(total: float) -> None:
    """Of Dir(A p): mean p, variance p (1 - p) / (A + 1); compared within five standard errors of 2000 draws."""
    p, n = numpy.array([0.1, 0.3, 0.6]), 2000
    with exactly():
        parameters = [Decimal(str(part * total)) for part in p]
        drawn = numpy.array([dirichlet(parameters, stream(7, number)) for number in range(n)], float)
    variance = p * (1 - p) / (total + 1)
    assert (numpy.abs(drawn.mean(axis=0) - p) < 5 * numpy.sqrt(variance / n)).all()
    assert drawn.var(axis=0) == pytest.approx(variance, rel=0.25)


def test_alphas_say_how_unlike_the_clients_are() -> None:
    classes = [1000, 1000, 1000, 1000]
    even = numpy.array(divide(DualDirichlet(alpha_size=Decimal("1e6"), alpha_class=Decimal("1e6")), classes, 4, 1))
    assert numpy.abs(even - 250).max() < 10
    lone = numpy.array(divide(DualDirichlet(alpha_size=Decimal("1e6"), alpha_class=Decimal("1e-6")), classes, 4, 1))
    assert (lone > 0).sum() <= 7, "each client has a class of its own, or two"
    sized = numpy.array(divide(DualDirichlet(alpha_size=Decimal("1e-6"), alpha_class=Decimal("1e6")), classes, 4, 1))
    assert sorted(sized.sum(axis=1)) == [0, 0, 0, 4000]


@given(least=st.integers(1, 5), more=st.integers(0, 5), clients=st.integers(1, 8), seed=st.integers(0, 99))
def test_with_method_class_each_client_has_so_many_classes_and_each_class_a_client(
    least: int, more: int, clients: int, seed: int
) -> None:
    most, classes = min(10, least + more), 10
    method = ByClass(least=least, most=most)
    if most * clients < classes:
        with pytest.raises(UsageError, match="cannot hold all 10"):
            divide(method, [500] * classes, clients, seed)
        return
    counts = divide(method, [500] * classes, clients, seed)
    assert all(least <= sum(count > 0 for count in row) <= most for row in counts)
    assert [sum(column) for column in zip(*counts, strict=True)] == [500] * classes


def test_the_published_draw_never_changes(tmp_path: Path) -> None:
    """Same seed, same bytes, on every machine and in every later version: these hashes are for good."""
    files = [records(tmp_path)]
    source, partition = plan(
        files, "label", ["a", "b", "c"], "dual-dirichlet", {"alpha-size": "8", "alpha-class": "2"}, 42
    )
    assert partition.counts == COUNTS
    write(source, partition, tmp_path / "out")
    joined = "".join(f"{name} {value}\n" for name, value in sorted(hashes(tmp_path / "out").items()))
    assert hashlib.sha256(joined.encode()).hexdigest() == HASH


COUNTS = [[84, 2, 20], [30, 74, 0], [14, 10, 66]]
HASH = "9195a4b76598053de499d6431ffa9b276b7e2b8b4d97b9ce686d7cfe76aaab77"


@pytest.mark.parametrize("method", ["dual-dirichlet", "dirichlet", "class"])
def test_the_files_hold_each_record_once_as_it_was(tmp_path: Path, method: str) -> None:
    path = records(tmp_path)
    source, partition = plan([path], "label", client_names(["3"]), method, {}, 5)
    write(source, partition, tmp_path / "out")
    parts = made(tmp_path / "out")
    assert sorted(parts) == ["client-1", "client-2", "client-3"]
    assert sorted(record["id"] for part in parts.values() for record in part) == list(range(300))
    lines = {line for part in (tmp_path / "out").glob("*.jsonl") for line in part.read_text().splitlines()}
    assert lines == set(path.read_text().splitlines()), "byte for byte"
    for name, row in zip(partition.clients, partition.counts, strict=True):
        found = Counter(record["label"] for record in parts[name])
        assert [found[label] for label in partition.classes] == row
        assert [record["id"] for record in parts[name]] == sorted(record["id"] for record in parts[name])


def test_another_seed_is_another_partition(tmp_path: Path) -> None:
    path = records(tmp_path)
    outs = []
    for seed in (1, 1, 2):
        source, partition = plan([path], "label", ["a", "b"], "dirichlet", {"alpha": "5"}, seed)
        outs.append(tmp_path / f"out{len(outs)}")
        write(source, partition, outs[-1])
    first, same, other = map(hashes, outs)
    assert first == same
    assert first["a.jsonl"] != other["a.jsonl"]


def test_parquet_keeps_its_columns_and_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flctl.dataset.sources._ROWS", 7)
    rows = [{"id": number, "label": number % 3, "extra": {"words": ["a"] * (number % 3)}} for number in range(50)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    source, partition = plan([tmp_path / "data.parquet"], "label", ["a", "b"], "dual-dirichlet", {}, 1)
    paths = write(source, partition, tmp_path / "out")
    parts = [pyarrow.parquet.read_table(path) for path in paths]
    assert all(part.schema.equals(table.schema) for part in parts)
    assert sorted((row for part in parts for row in part.to_pylist()), key=lambda row: row["id"]) == rows
    assert partition.classes == ["0", "1", "2"]


def test_the_command_shows_counts_and_bars_and_writes_record_and_picture(tmp_path: Path) -> None:
    path = records(tmp_path)
    out = tmp_path / "out"
    ran = flctl(str(path), "--by", "label", "--clients", "pisa", "brno", "--seed", "3", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    record = json.loads((out / "partition.json").read_text())
    assert record["classes"] == list(LABELS) and sorted(record["clients"]) == ["brno", "pisa"]
    parts = made(out)
    for name, row in record["clients"].items():
        assert f"{sum(row)}" in next(line for line in ran.stdout.splitlines() if line.startswith(name))
        assert sum(row) == len(parts[name])
    assert any(set(line.partition("  ")[2]) <= set("ABC") for line in ran.stdout.splitlines() if "  A" in line)
    svg = xml.parse(out / "partition.svg")
    titles = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}title")]
    wanted = [f"{n}: {c} of {LABELS[p]}" for n, row in record["clients"].items() for p, c in enumerate(row) if c]
    assert sorted(map(str, titles)) == sorted(wanted)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    path = records(tmp_path)
    ran = flctl(str(path), "--by", "label", "--clients", "2", "--dry-run", "--json", "--out", str(tmp_path / "out"))
    answer = json.loads(ran.stdout)
    assert sum(sum(row) for row in answer["data"]["clients"].values()) == 300
    assert answer["data"]["paths"] == [] and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """The dataset grew between counting and writing."""
    path = records(tmp_path)
    source, partition = plan([path], "label", ["a", "b"], "dual-dirichlet", {"alpha-class": "50"}, 1)
    with path.open("a") as file:
        file.write("\n" + json.dumps({"label": "neutral"}) + "\n")
    with pytest.raises(ConfigurationError, match="changed while it was read"):
        write(source, partition, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--clients", "2", "--by", "lable"], 3, 'there is no "lable"\n  -> --by one of: id, label, text'),
        (["--clients", "2", "--by", "label", "--alpha", "3"], 2, "--alpha says nothing to --method dual-dirichlet"),
        (["--clients", "2", "--by", "label", "--alpha-class", "0"], 2, "--alpha-class 0 is not between"),
        (["--clients", "2", "--by", "label", "--alpha-size", "NaN"], 2, "--alpha-size NaN is not between"),
        (["--clients", "2", "--method", "class"], 2, "--by FIELD"),
        (["--clients", "2", "--by", "label", "--method", "class", "--classes-per-client", "1"], 2, "cannot hold all 3"),
        (["--clients", "a", "a", "--by", "label"], 2, "a is there twice"),
        (["--clients", "../a", "b", "--by", "label"], 2, "../a is no name of a client"),
        (["--clients", "501", "--by", "label"], 2, "1 to 500"),
        (["--clients", "4", "--by", "label", "--alpha-size", "1e-6"], 3, "would get no records"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_type(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    path = records(tmp_path)
    ran = flctl(str(path), *words, "--out", str(tmp_path / "out"))
    assert (ran.returncode, said in ran.stderr) == (code, True), ran.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "data.jsonl:1: not JSON"),
        ("[1]", "not a JSON object"),
        ('{"label": null}', "names no class"),
        ("", "no records"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigurationError, match=said):
        plan([path], "label", ["a", "b"], "dual-dirichlet", {}, 1)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    path = records(tmp_path)
    ran = flctl(str(path), "--by", "label", "--clients", "2", "--out", str(tmp_path))
    assert ran.returncode == 3 and "nothing is overwritten" in ran.stderr
    assert list(tmp_path.iterdir()) == [path]
