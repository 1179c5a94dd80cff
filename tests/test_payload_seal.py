"""seal.py: one start per attempt, whoever races; success only where the record says so; revoked means never started."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from flctl.records import FileEntry, folder_sha256

SEAL = Path(__file__).parent.parent / "flctl" / "payload" / "seal.py"


class Place:
    """A campaign's folder at a site, with one delivered attempt."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "runs" / "0001-1"
        self.run.mkdir(parents=True)
        model = root / "models" / "0002"
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(b"weights")
        (model / "flctl.json").write_text("{}")
        entry = FileEntry(path="model.safetensors", size=7, sha256=sha256(b"weights").hexdigest())
        self.order = {
            "schema": 1, "token": "fabc", "campaign": "camp", "campaign_id": "1", "site": "brno", "number": 1,
            "attempt": 1, "work": "train", "base": {"version": 2, "sha256": folder_sha256([entry])}, "round": 3,
            "steps": 10, "global_step": 20, "total_steps": 40, "seed": 5, "train": {}, "subjects": [],
        }  # fmt: skip
        self.write_order()

    def write_order(self) -> None:
        (self.run / "order.json").write_text(json.dumps(self.order))

    def call(self, command: str, *arguments: str, nonce: str = "n1") -> subprocess.CompletedProcess:
        words = [sys.executable, "-I", str(SEAL), command, "--run", str(self.run), "--nonce", nonce, *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    def start(self, nonce: str = "n1", walltime: int = 600) -> subprocess.CompletedProcess:
        where = ["--workdir", str(self.root), "--data", "/da ta/it's"]
        return self.call("start", *where, "--walltime", str(walltime), "--job-id", f"j-{nonce}", nonce=nonce)

    def train(self, **metrics: object) -> None:
        out = self.run / "out"
        (out / "model.safetensors").write_bytes(b"new weights")
        (out / "metrics.json").write_text(json.dumps({"steps": 10, "samples": 80, "tokens": 800} | metrics))

    def finish(self, status: int = 0, signal: str = "", nonce: str = "n1") -> subprocess.CompletedProcess:
        return self.call("finish", "--status", str(status), *(["--signal", signal] if signal else []), nonce=nonce)

    @property
    def done(self) -> dict:
        return json.loads((self.run / "done.json").read_text())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_start_prints_the_environment_of_the_contract(place: Place) -> None:
    started = place.start()
    assert started.returncode == 0, started.stderr
    names = [
        "MODEL",
        "OUT",
        "DATA",
        "STATE",
        "FROZEN",
        "ORDER",
        "STEPS",
        "GLOBAL_STEP",
        "TOTAL_STEPS",
        "SEED",
        "DEADLINE",
    ]
    show = "; ".join(f'printf "%s\\n" "$FLCTL_{name}"' for name in names)
    values = subprocess.run(["bash", "-c", started.stdout + show], capture_output=True, text=True).stdout.splitlines()
    told = dict(zip(names, values, strict=True))
    assert told["MODEL"] == str(place.root / "models" / "0002")
    assert told["DATA"] == "/da ta/it's"
    assert (told["STEPS"], told["GLOBAL_STEP"], told["TOTAL_STEPS"], told["SEED"]) == ("10", "20", "40", "5")
    assert Path(told["OUT"]).is_dir()
    assert not os.listdir(told["OUT"])
    assert Path(told["STATE"]).is_dir()
    began = json.loads((place.run / "owner").read_text())["time"]
    assert began < int(told["DEADLINE"]) < began + 600 - 29


def test_of_many_copies_of_a_job_exactly_one_starts(place: Place) -> None:
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda n: place.start(nonce=f"copy{n}").returncode, range(8)))
    assert sorted(codes) == [0] + [75] * 7
    assert (
        json.loads((place.run / "fenced").read_text())["nonce"]
        != json.loads((place.run / "owner").read_text())["nonce"]
    )


def test_a_copy_that_is_not_the_owner_cannot_seal(place: Place) -> None:
    place.start()
    place.train()
    assert place.finish(nonce="other").returncode == 75
    assert not (place.run / "done.json").exists()


def test_a_revoked_attempt_never_starts(place: Place) -> None:
    revoked = place.call("revoke", nonce="rfabc")
    assert json.loads(revoked.stdout)["by"] == "flctl"
    assert place.start().returncode == 75


def test_revoking_a_started_attempt_tells_whose_it_is(place: Place) -> None:
    place.start()
    owner = json.loads(place.call("revoke", nonce="rfabc").stdout)
    assert (owner["by"], owner["job_id"]) == ("job", "j-n1")


def test_revoking_again_is_still_ours(place: Place) -> None:
    place.call("revoke", nonce="rfabc")
    assert json.loads(place.call("revoke", nonce="rfabc").stdout)["by"] == "flctl"


def test_a_good_end_is_recorded_with_every_file(place: Place) -> None:
    place.start()
    place.train()
    assert place.finish().returncode == 0
    done = place.done
    assert (done["outcome"], done["reason"], done["steps"], done["samples"]) == ("done", "", 10, 80)
    assert done["base"] == place.order["base"]
    assert done["started_at"] <= done["ended_at"]
    files = {item["path"]: item for item in done["files"]}
    assert set(files) == {"metrics.json", "model.safetensors"}
    assert files["model.safetensors"]["sha256"] == sha256(b"new weights").hexdigest()


@pytest.mark.parametrize(
    ("status", "signal", "metrics", "reason"),
    [
        (1, "", {}, "exited with status 1"),
        (0, "TERM", {}, "SIGTERM"),
        (0, "", {"steps": 0}, "steps"),
        (0, "", {"samples": "80"}, "samples"),
    ],
)
def test_anything_else_is_a_failure_with_its_reason(
    place: Place, status: int, signal: str, metrics: dict, reason: str
) -> None:
    place.start()
    place.train(**metrics)
    place.finish(status, signal)
    assert place.done["outcome"] == "failed"
    assert reason in place.done["reason"]


def test_success_without_weights_or_metrics_is_a_failure(place: Place) -> None:
    place.start()
    place.finish()
    assert place.done["outcome"] == "failed"
    assert "metrics.json" in place.done["reason"]


def test_the_trainers_own_words_are_in_the_reason(place: Place) -> None:
    place.start()
    (place.run / "log").write_text("step 1\ntrain.py: error: the loss is not a number\n\x1b[0m bye\n")
    place.finish(3)
    assert "train.py: error: the loss is not a number" in place.done["reason"]


@pytest.mark.parametrize(
    ("log", "failure", "reason"),
    [
        ("train.py: error [memory]: out of GPU memory", "memory", "out of GPU memory"),
        ("flctl: error [diverged]: the loss is nan\nTraceback\n", "diverged", "the loss is nan"),
        ("0: train.py: error [data]: of rank 0\n3: train.py: error [data]: of rank 3", "data", "of rank 3"),
        ("[1,2]<stderr>:train.py: error [time]: no step", "time", "no step"),
        ("[default1]:train.py: error [model]: unknown", "model", "unknown"),
        ("train.py: error [memory]: why\ntrain.py: error: a rank is gone", "memory", "why"),
        ("train.py: error [options]: a\x1b[2Jb\x07", "options", "a[2Jb"),
        ("flctl: error [Not One]: words", "", "the program exited with status 3"),
        ("I saw train.py: error [memory]: words", "", "the program exited with status 3"),
        ("flctl: error: words", "", "the program exited with status 3: flctl: error: words"),
    ],
)
def test_the_class_of_failure_that_a_program_names_is_recorded(
    place: Place, log: str, failure: str, reason: str
) -> None:
    """Of several ranks the last that names one; a launcher may write the rank in front."""
    place.start()
    (place.run / "log").write_text(f"step 1\n{log}\n")
    place.finish(3)
    assert (place.done["failure"], place.done["reason"], place.done["cause"]) == (failure, reason, "program")


def test_a_job_that_was_ended_from_outside_failed_of_no_class(place: Place) -> None:
    place.start()
    (place.run / "log").write_text("train.py: error [time]: told to end\n")
    place.finish(143, "TERM")
    assert (place.done["failure"], place.done["cause"]) == ("", "signal")


def test_the_first_record_stands(place: Place) -> None:
    place.start()
    place.train()
    place.finish()
    place.finish(1)
    assert place.done["outcome"] == "done"


def test_a_changed_base_is_not_trained_on(place: Place) -> None:
    (place.root / "models" / "0002" / "model.safetensors").write_bytes(b"WEIGHTS")
    assert place.start().returncode == 76
    place.finish(76)
    assert place.done["outcome"] == "failed"
    assert "sha256 differs" in place.done["reason"]
    assert place.done["cause"] == "base"


def test_newest_is_resolved_when_the_job_starts(place: Place) -> None:
    place.order["base"] = {"version": "newest"}
    place.write_order()
    (place.root / "models" / "0010").mkdir()
    started = place.start()
    assert "models/0010" in started.stdout
    place.train()
    place.finish()
    assert place.done["base"]["version"] == 10


def test_links_in_the_output_are_never_listed(place: Place) -> None:
    place.start()
    place.train()
    (place.run / "out" / "passwd").symlink_to("/etc/passwd")
    place.finish()
    assert "passwd" not in {item["path"] for item in place.done["files"]}


class Attempts:
    """Two attempts of one run."""

    def __init__(self, root: Path) -> None:
        self.first = Place(root)
        self.second = Place.__new__(Place)
        self.second.root, self.second.run = root, root / "runs" / "0001-2"
        self.second.run.mkdir()
        self.second.order = self.first.order | {"attempt": 2, "token": "fabd"}
        self.second.write_order()

    def start(self, place: Place) -> Path:
        """The checkpoint folder that the attempt's program is given."""
        started = place.start()
        assert started.returncode == 0, started.stderr
        shown = subprocess.run(
            ["bash", "-c", started.stdout + "echo $FLCTL_CHECKPOINT"], capture_output=True, text=True
        )
        return Path(shown.stdout.strip())


def test_the_next_attempt_goes_on_from_the_checkpoint_and_is_its_only_writer(tmp_path: Path) -> None:
    """A copy of the first attempt that still lives has no folder to write to any more."""
    attempts = Attempts(tmp_path)
    before = attempts.start(attempts.first)
    assert before.is_dir() and not list(before.iterdir())
    (before / "progress").write_text("7\n")
    (before / "step.pt").write_bytes(b"state")
    after = attempts.start(attempts.second)
    assert (after / "step.pt").read_bytes() == b"state"
    assert not before.exists()
    attempts.second.finish(1, "TERM")
    done = attempts.second.done
    assert (done["progress"], done["cause"]) == (7, "signal")
    assert after.is_dir(), "kept for the next"


def test_another_task_begins_anew(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    (attempts.start(attempts.first) / "progress").write_text("7")
    attempts.second.order["train"] = {"lr": 1.0}
    attempts.second.write_order()
    assert not list(attempts.start(attempts.second).iterdir())


def test_a_checkpoint_goes_away_with_success(place: Place) -> None:
    place.start()
    (place.run / "checkpoint" / "progress").write_text("10")
    place.train()
    place.finish()
    assert (place.done["outcome"], place.done["cause"], place.done["progress"]) == ("done", "", 10)
    assert not (place.run / "checkpoint").exists()


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5", "1 2", "9" * 13, "\x00", "\u0663"])
def test_progress_that_is_no_whole_number_is_none(place: Place, text: str) -> None:
    place.start()
    (place.run / "checkpoint" / "progress").write_bytes(text.encode())
    place.finish(3)
    assert (place.done["progress"], place.done["cause"]) == (None, "program")


def test_progress_that_leads_elsewhere_is_none(place: Place) -> None:
    place.start()
    (place.run / "secret").write_text("42")
    (place.run / "checkpoint" / "progress").symlink_to(place.run / "secret")
    place.finish(3)
    assert place.done["progress"] is None


def test_revocations_beside_each_other_all_learn_the_owner(place: Place) -> None:
    """A connection that was cut leaves one behind; the next contact revokes again, under the same nonce."""
    for attempt in range(6):
        place.run = place.root / "runs" / f"0001-{attempt + 1}"
        place.run.mkdir(exist_ok=True)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: place.call("revoke", nonce="rsame"), range(8)))
        assert [answer.returncode for answer in answers] == [0] * 8, answers[0].stderr
        assert {json.loads(answer.stdout)["by"] for answer in answers} == {"flctl"}
        assert sorted(path.name for path in place.run.iterdir() if path.name != "order.json") == ["owner"]


def frozen(place: Place, folder: Path) -> dict:
    """An order for an adapter whose base lies in `folder`."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(name.encode() * 100)
    entries = [
        {
            "path": name,
            "size": (folder / name).stat().st_size,
            "sha256": sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("config.json", "model.safetensors")
    ]
    place.order["frozen"] = {"folder": str(folder), "sha256": "0" * 64, "files": entries}
    place.write_order()
    return place.order["frozen"]


def test_a_job_gets_the_frozen_base_that_is_what_was_ordered(place: Place, tmp_path: Path) -> None:
    told = frozen(place, tmp_path / "it's a base")
    started = place.start()
    assert started.returncode == 0, started.stderr
    shown = subprocess.run(["bash", "-c", started.stdout + 'printf %s "$FLCTL_FROZEN"'], capture_output=True, text=True)
    assert shown.stdout == told["folder"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [("gone", "is missing"), ("cut", "99 bytes"), ("changed", "sha256 differs")],
)
def test_another_frozen_base_than_was_ordered_ends_the_job(
    place: Place, tmp_path: Path, spoil: str, words: str
) -> None:
    frozen(place, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    if spoil == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x" * (99 if spoil == "cut" else path.stat().st_size))
    assert place.start().returncode == 76
    place.finish(status=76)
    assert (place.done["cause"], place.done["outcome"]) == ("base", "failed")
    assert words in place.done["reason"] and str(path) in place.done["reason"]
    assert not (place.root / "frozen.json").exists()


def ask_frozen(place: Place, told: dict, *options: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-I", str(SEAL), "frozen", "--workdir", str(place.root), *options]
    return subprocess.run(words, input=json.dumps(told), capture_output=True, text=True, timeout=60)


def test_a_frozen_base_is_hashed_once_and_then_believed_by_its_looks(place: Place, tmp_path: Path) -> None:
    told = frozen(place, tmp_path / "base")
    assert ask_frozen(place, told).returncode == 0
    path = tmp_path / "base" / "model.safetensors"
    looked, size = path.stat(), path.stat().st_size
    path.write_bytes(b"x" * size)
    os.utime(path, ns=(looked.st_atime_ns, looked.st_mtime_ns))
    assert ask_frozen(place, told).returncode == 0  # nobody read it
    os.utime(path, ns=(looked.st_atime_ns, looked.st_mtime_ns + 1))
    answer = ask_frozen(place, told)
    assert (answer.returncode, answer.stdout) == (76, f"{path} is not the frozen base's: its sha256 differs")
    assert ask_frozen(place, told, "--placed").returncode == 0  # it was hashed by others just now
    assert ask_frozen(place, told).returncode == 0
