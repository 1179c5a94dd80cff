"""The audit: any changed byte is found and named with its round; what crossed a border is told as it was; what came in
without being invited is found."""

import json
import random
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from flctl.campaign.audit import audit
from flctl.campaign.chain import lines_of
from flctl.campaign.journal import Journal
from flctl.campaign.look import Difference, record_fault
from flctl.campaign.workspace import Workspace, write_json
from tests import campaigns
from tests.campaigns import Campaign
from tests.chaos.proxy import Proxy
from tests.ssh_campaigns import SshCampaign
from tests.testbed.sshd import Sshd

USERS_OWN = ("flctl.toml", "known_hosts", "sites/", "templates/")
"""What a person may edit at any time: no record."""
ROUNDS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """A campaign of two rounds, with evaluations after each."""
    campaign = Campaign(tmp_path_factory.mktemp("audit"))
    campaign.set("cross = false", "cross = true")
    ran = campaign.flctl("round", "--rounds", str(ROUNDS))
    assert ran.returncode == 0, ran.stderr
    return campaign


@pytest.fixture
def place(finished: Campaign, tmp_path: Path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(finished.place, tmp_path / "copy"))


def found(place: Path) -> tuple[Difference, ...]:
    return audit(Workspace(place)).differences


def recorded(place: Path) -> list[Path]:
    """Every file that flctl wrote and that says something."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in files if not path.relative_to(place).as_posix().startswith(USERS_OWN)]


def round_of(place: Path, path: Path, offset: int) -> int:
    """The model that was being made when this byte was written."""
    parts = path.relative_to(place).parts
    if parts[0] == "models":
        return int(parts[1])
    if parts[0] == "runs" and parts[2].isdigit():
        return int(json.loads((place.joinpath(*parts[:3]) / "run.json").read_text())["order"]["round"])
    if path.name == "journal.jsonl":
        begun = 0
        for line in path.read_bytes().splitlines(keepends=True):
            begun += len(line)
            entry = json.loads(line)
            if entry["event"] == "model" and begun > offset:
                return int(entry["version"])
    return ROUNDS + 1


def test_a_campaign_that_nobody_touched_is_clean(finished: Campaign) -> None:
    answer = finished.json("audit")
    assert answer["data"]["differences"] == answer["data"]["notes"] == []
    assert (answer["data"]["models"], answer["data"]["collected"]) == (3, [])
    ran = finished.flctl("audit")
    assert ran.returncode == 0
    assert f"the chain ends in {answer['data']['head']}" in ran.stdout
    newest = (finished.place / "models" / "0002" / "flctl.json").read_bytes()
    assert answer["data"]["head"] == sha256(newest).hexdigest()


def test_any_changed_byte_of_any_file_is_found_and_named_with_its_file_and_its_round(place: Path) -> None:
    dice, files = random.Random(5), recorded(place)
    assert {path.name for path in files} >= {"done.json", "order.json", "job.sh", "run.json", "plan.json", "flctl.json"}
    for path in files:
        raw = path.read_bytes()
        for offset in {0, len(raw) - 1, *dice.sample(range(len(raw)), min(2, len(raw)))}:
            version = round_of(place, path, offset)
            changed = bytearray(raw)
            changed[offset] = dice.choice([byte for byte in range(256) if byte != raw[offset]])
            path.write_bytes(changed)
            differences = found(place)
            where = (path.relative_to(place).as_posix(), offset, bytes(changed[offset : offset + 1]))
            assert {(one.file, one.round) for one in differences} == {(where[0], version)}, (where, differences)
            path.write_bytes(raw)
    assert found(place) == ()


@pytest.mark.parametrize("name", ["plan.json", "runs/brno/contact.json", "runs/brno/0001/run.json"])
def test_every_single_byte_of_a_record_counts(place: Path, name: str) -> None:
    path = place / name
    raw = path.read_bytes()
    for offset in range(len(raw)):
        changed = bytearray(raw)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        assert record_fault(path), (offset, raw[offset : offset + 10])


def test_what_is_gone_and_what_is_there_besides_is_named(place: Path) -> None:
    gone = [place / "models" / "0001" / "config.json", place / "runs" / "pisa" / "0001" / "1" / "done.json"]
    extra = [place / "models" / "0002" / "notes.txt", place / "runs" / "brno" / "0001" / "1" / "out" / "data.bin"]
    for path in gone:
        path.unlink()
    for path in extra:
        path.write_text("x")
    differences = {(one.file, one.what) for one in found(place)}
    assert differences == {
        *((path.relative_to(place).as_posix(), "is missing") for path in gone),
        *((path.relative_to(place).as_posix(), "is named by no record") for path in extra),
    }


def test_a_model_that_is_gone_altogether_is_missed(place: Path) -> None:
    shutil.rmtree(place / "models" / "0002")
    assert ("models/0002/flctl.json", 2) in {(one.file, one.round) for one in found(place)}


def test_a_record_that_was_forged_with_its_checksum_is_found_by_what_names_it(place: Path) -> None:
    path = place / "models" / "0001" / "flctl.json"
    record = json.loads(path.read_text())
    record.pop("check")
    record["contributions"][0]["weight"] *= 2
    write_json(path, record)
    (difference,) = found(place)
    assert (difference.file, difference.round) == ("models/0001/flctl.json", 1)
    assert "the journal and model 0002 name" in difference.what


def rewritten(path: Path, entries: list[dict[str, Any]]) -> None:
    """A journal of these entries, with every checksum as it should be."""
    path.unlink()
    for entry in entries:
        facts = {key: value for key, value in entry.items() if key not in ("seq", "prev", "at", "event", "check")}
        Journal(path).append(entry["event"], **facts)


def test_a_journal_that_was_written_anew_is_found_by_the_models_that_name_its_lines(place: Path) -> None:
    path = place / "journal.jsonl"
    entries = [dict(line.entry) for line in lines_of(path)]
    first = next(entry for entry in entries if entry["event"] == "file" and entry["direction"] == "in")
    rewritten(path, [entry for entry in entries if entry is not first])
    assert Journal(path).damage() == ()
    differences = [one for one in found(place) if one.file == "journal.jsonl"]
    assert {one.round for one in differences} >= {1, 2}
    assert "is not the line that the record of model 0001 names" in differences[0].what


def test_a_campaign_of_an_older_flctl_is_read_and_said_to_be_one(place: Path) -> None:
    for path in (place / "models").glob("*/flctl.json"):
        record = json.loads(path.read_text())
        for key in ("previous", "journal", "check"):
            record.pop(key, None)
        for item in record["contributions"]:
            item.pop("records")
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    path = place / "journal.jsonl"
    rewritten(path, [{k: v for k, v in dict(line.entry).items() if k != "record"} for line in lines_of(path)])
    result = audit(Workspace(place))
    assert result.differences == ()
    assert [note[:10] for note in result.notes] == ["model 0002", "model 0001"]


# What crossed the borders


def test_every_file_that_crossed_is_told_by_site_direction_kind_and_model(finished: Campaign) -> None:
    rows = finished.json("audit")["data"]["crossings"]
    size = sum(entry["size"] for entry in model_record(finished.place, 0)["files"])
    weights = (finished.place / "models" / "0000" / "model.safetensors").stat().st_size
    assert total(rows, site="brno", direction="out", kind="model", round=1) == size
    assert total(rows, site="pisa", direction="in", kind="model file", round=2) == weights
    assert {row["kind"] for row in rows if row["direction"] == "in"} == {"model file", "record"}
    assert {row["kind"] for row in rows if row["direction"] == "out"} == {"model", "order", "payload", "contribution"}
    moved = [entry for entry in finished.journal() if entry["event"] == "file"]
    assert sum(row["bytes"] for row in rows) == sum(entry["size"] for entry in moved)
    assert sum(row["files"] for row in rows) == len(moved)


def model_record(place: Path, version: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((place / "models" / f"{version:04d}" / "flctl.json").read_text())
    return record


def total(rows: list[dict[str, Any]], **wanted: Any) -> int:
    return sum(row["bytes"] for row in rows if all(row[key] == value for key, value in wanted.items()))


@pytest.mark.parametrize(
    ("path", "size", "words"),
    [
        ("data/private.txt", 9, "is on no list"),
        ("runs/0001-1/out/private.safetensors", 9, "which the completion record does not name so"),
        ("runs/0001-1/out/model.safetensors", 9, "which the completion record does not name so"),
        ("runs/0001-1/log", (64 << 10) + 1, "more than a log may have"),
        ("runs/0001-1/owner", (1 << 20) + 1, "more than a record may have"),
        (".test-0123abcd", 4097, "more than a test may have"),
    ],
)
def test_what_came_in_without_being_invited_is_found(place: Path, path: str, size: int, words: str) -> None:
    journal = Workspace(place).journal
    journal.append("file", direction="in", site="brno", path=path, size=size, sha256="0" * 64)
    (difference,) = found(place)
    assert (difference.file, difference.round) == ("journal.jsonl", ROUNDS + 1)
    assert words in difference.what


def test_a_log_is_capped_journaled_and_shown_without_control_characters(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, ("brno",))
    assert campaign.flctl("round").returncode == 0
    log = campaign.remote("brno") / "runs" / "0001-1" / "log"
    log.write_text("canary " * 40_000 + "\n\x1b]0;title\x07\x1b[31mred\x1b[0m \x9b5mgone\u202e\n")
    ran = campaign.flctl("log", "brno", "--lines", "1000")
    assert ran.returncode == 0, ran.stderr
    assert "red" in ran.stdout
    assert len(ran.stdout.encode()) <= 64 << 10
    assert all(letter.isprintable() or letter == "\n" for letter in ran.stdout)
    entry = [entry for entry in campaign.journal() if entry["event"] == "file"][-1]
    told = log.read_bytes()[-(64 << 10) :].decode(errors="replace").encode()[-(64 << 10) :]
    assert (entry["path"], entry["direction"]) == ("runs/0001-1/log", "in")
    assert (entry["size"], entry["sha256"]) == (len(told), sha256(told).hexdigest())
    assert total(campaign.json("audit")["data"]["crossings"], kind="log") == entry["size"]


def test_a_folder_that_was_rebuilt_from_the_sites_is_clean_and_what_it_took_is_told(
    finished: Campaign, tmp_path: Path
) -> None:
    paths = ",".join(str(path) for path in sorted((finished.place / "sites").glob("*.toml")))
    adopted = tmp_path / "adopted"
    ran = finished.flctl("adopt", str(adopted), "--sites", paths, "--id", finished.remote("brno").name, at=tmp_path)
    assert ran.returncode == 0, ran.stderr
    data = finished.json("-C", str(adopted), "audit")["data"]
    assert data["differences"] == []
    assert total(data["crossings"], direction="in", kind="model") > 0
    journal = Workspace(adopted).journal
    journal.append("file", direction="in", site="brno", path="models/0002/more.bin", size=1, sha256="0" * 64)
    (difference,) = found(adopted)
    assert "which the model's record does not name so" in difference.what


# What was on the wire


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(name="audit", address="127.0.96.1", port=24600, user="flctl-audit") as server:
        yield server


def big_model(folder: Path, dtype: str = "float32") -> None:
    """A model of 8 MB that no compression makes smaller."""
    from flctl.model.tiny import write_tiny_model

    write_tiny_model(folder, seed=1, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.more.weight"] = numpy.random.default_rng(1).standard_normal((2 << 20,)).astype("float32")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_bytes_on_the_wire_are_those_of_the_journal(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaigns, "make_model", big_model)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Proxy(server.address, server.port) as road:
        campaign = SshCampaign(tmp_path, server, host=road.address, port=road.port)
        ran = campaign.flctl("round", timeout=300)
        assert ran.returncode == 0, ran.stderr
        data = campaign.json("audit")["data"]
        journaled = {way: total(data["crossings"], site="audit", direction=way) for way in ("out", "in")}
        for way, seen in (("out", road.up), ("in", road.down)):
            # SSH's own packets, rsync's lists and flctl's questions come on top.
            assert journaled[way] <= seen <= journaled[way] * 1.04, (way, journaled, seen)
        assert data["logins"] == {"audit": road.made}
        campaign.clear()
