"""What may go wrong under a merge: one clear error, no draft, the models before it untouched."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flctl.errors import AggregationRefused, BudgetRefused, ConfigurationError, FlctlError
from flctl.model.header import HEADER_LIMIT
from flctl.model.manifest import hash_folder
from flctl.model.merge import Source, merge
from tests.checkpoints import FLOATS, data_of, header_of, raw_file, read_weights, to_bf16, write_weights
from tests.test_model_shards import LIES

SITES = ("brno", "leonardo")
GUILTY = "leonardo"


def model(seed: int, rows: int = 50) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        "embed": ("F32", rng.normal(size=(rows, 8)).astype(np.float32)),
        "norm": ("F16", rng.normal(size=8).astype(np.float16)),
        "steps": ("I64", np.array([seed], np.int64)),
    }


class Campaign:
    """A base, two contributions, and the previous model beside the draft."""

    def __init__(self, root: Path, models: Path | None = None, rows: int = 50) -> None:
        self.chunk = 10 if rows < 1000 else 1 << 16
        self.models = models or root / "models"
        self.models.mkdir(exist_ok=True)
        self.base = write_weights(root / "base", model(0, rows), {"embed": "1", "norm": "2", "steps": "2"})
        (self.base / "config.json").write_text("{}")
        self.given = [write_weights(root / site, model(place, rows)) for place, site in enumerate(SITES, start=1)]
        self.guilty, self.draft = self.given[1], self.models / "draft"
        self.sources = [
            Source(site=site, number=1, folder=folder, weight=1) for site, folder in zip(SITES, self.given, strict=True)
        ]
        previous = write_weights(self.models / "previous", model(9, 5))
        self._before = hash_folder(previous)

    def merge(self, progress: Callable[[int], None] | None = None) -> None:
        merge(self.base, self.sources, self.draft, progress=progress, chunk=self.chunk)

    def refusal(
        self,
        reason: str,
        kind: type[FlctlError] = AggregationRefused,
        site: str | None = GUILTY,
        progress: Callable[[int], None] | None = None,
    ) -> FlctlError:
        """The one error of a merge that leaves nothing behind and touches nothing."""
        base = hash_folder(self.base)
        with pytest.raises(FlctlError, match=reason) as refusal:
            self.merge(progress)
        assert type(refusal.value) is kind
        assert refusal.value.site == site
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 1000
        assert not self.draft.exists()
        assert hash_folder(self.models / "previous") == self._before
        assert hash_folder(self.base) == base
        return refusal.value


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


def test_the_campaign_that_the_faults_befall_merges(campaign: Campaign) -> None:
    campaign.merge()
    assert sorted(read_weights(campaign.draft)) == ["embed", "norm", "steps"]


# Contributions


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies(case: str, campaign: Campaign) -> None:
    header, reason = LIES[case]
    path = campaign.guilty / "model.safetensors"
    path.write_bytes(raw_file(header, bytes(32)))
    assert str(path) in campaign.refusal(reason).message


def claim(length: int, size: int | None = None, text: bytes = b"{}") -> Callable[[Path], object]:
    """A file that claims a header of `length` bytes."""

    def write(path: Path) -> None:
        path.write_bytes(length.to_bytes(8, "little") + text)
        if size:
            os.truncate(path, size)

    return write


def cut(size: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def with_dtype(dtype: str) -> Callable[[Path], object]:
    header = {"embed": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}
    return lambda path: path.write_bytes(raw_file(header, bytes(8)))


def with_text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(raw_file(text, data_of(model(2))))


HEADER = json.dumps(header_of(model(2)))
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (cut(0), "truncated: 0 bytes hold no header"),
    "cut_in_the_length": (cut(7), "truncated: 7 bytes hold no header"),
    "cut_in_the_header": (cut(50), "truncated: the header ends at byte"),
    "cut_in_the_data": (cut(-1), "truncated: the tensors end at byte"),
    "header_of_a_terabyte": (claim(1 << 40, size=1 << 41), "a header of 1099511627776 bytes is too long"),
    "header_of_the_most_bytes": (claim((1 << 64) - 1), "is too long"),
    "header_of_more_than_8_MiB": (
        claim(HEADER_LIMIT + 8, text=b"{" + b" " * HEADER_LIMIT + b'"a":1}x'),
        f"a header of {HEADER_LIMIT + 8} bytes is too long",
    ),
    "header_of_8_MiB_of_lists": (with_text('{"a":[' + "[]," * 2_700_000 + "1]}"), "too many values"),
    "header_of_NaN": (with_text(HEADER.replace("50,", "NaN,")), "no possible shape: \\[NaN, 8\\]"),
    "header_of_Infinity": (with_text(HEADER.replace("50,", "Infinity,")), "no possible shape: \\[Infinity"),
    "header_of_a_minus_zero": (with_text(HEADER.replace("[0, 1600]", "[-0, 1600]")), "no possible data_offsets"),
    "shape_of_2_to_the_63": (with_text(HEADER.replace("[50, 8]", "[9223372036854775808]")), "no possible shape"),
    "shape_that_overflows_to_0": (
        with_text(HEADER.replace("[50, 8]", "[4294967296, 4294967296]")),
        "needs more than 9223372036854775807 bytes",
    ),
    "shape_that_overflows_before_a_0": (
        with_text(HEADER.replace("[50, 8]", "[4294967296, 4294967296, 0]").replace("[0, 1600]", "[0, 0]")),
        "needs more than 9223372036854775807 bytes",
    ),
    "half_a_character": (with_text('{"__metadata__":{"a":"\\ud800"}}'), "not Unicode"),
    "F8_E4M3": (with_dtype("F8_E4M3"), "tensor 'embed' has dtype \"F8_E4M3\", not one of F64, F32, F16, BF16"),
    "F8_E5M2": (with_dtype("F8_E5M2"), 'dtype "F8_E5M2"'),
    "F4": (with_dtype("F4"), 'dtype "F4"'),
    "C64": (with_dtype("C64"), 'dtype "C64"'),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "too long"),
    "gone": (lambda path: path.unlink(), "no model.safetensors"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_checkpoint(case: str, campaign: Campaign) -> None:
    change, reason = FILES[case]
    change(campaign.guilty / "model.safetensors")
    assert str(campaign.guilty) in campaign.refusal(reason).message


def test_the_same_of_a_base_is_nobodys_fault_but_ours(campaign: Campaign) -> None:
    os.truncate(campaign.base / "model-1.safetensors", 100)
    assert "base/model-1.safetensors" in campaign.refusal("truncated", site=None).message


def bound_socket(path: Path) -> None:
    """By a short name, as a socket's may have 107 bytes at most."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "not a regular file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "socket": (bound_socket, "No such device or address"),
    "device": (lambda path: os.mknod(path, 0o20644, os.makedev(1, 5)), "not a regular file"),
    "link_to_a_device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "link_to_no_end": (lambda path: path.symlink_to(path.name), "symbolic links|no model.safetensors|No such"),
    "link_to_nothing": (lambda path: path.symlink_to("nothing.safetensors"), "no model.safetensors|No such file"),
    "a_file_without_a_size": (lambda path: path.symlink_to("/proc/self/status"), "truncated: 0 bytes"),
}


@pytest.mark.parametrize("place", ["model.safetensors", "model-2.safetensors"])
@pytest.mark.parametrize("case", ODD)
def test_something_that_is_no_file_is_not_waited_for(case: str, place: str, campaign: Campaign) -> None:
    make, reason = ODD[case]
    if place != "model.safetensors":
        (campaign.guilty / "model.safetensors").unlink()
        write_weights(campaign.guilty, model(2), {"embed": "1", "norm": "2", "steps": "2"})
    (campaign.guilty / place).unlink()
    make(campaign.guilty / place)
    campaign.refusal(reason)


def test_a_link_to_a_file_is_that_file(campaign: Campaign) -> None:
    """The cache of the Hugging Face hub is made of them."""
    (campaign.guilty / "model.safetensors").rename(campaign.guilty / "blob")
    (campaign.guilty / "model.safetensors").symlink_to("blob")
    campaign.merge()


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../brno/model.safetensors", "no safetensors file of this folder"),
        ("/etc/passwd", "no safetensors file of this folder"),
        ("..", "no safetensors file of this folder"),
        ("C:\\model.safetensors", "no safetensors file of this folder"),
        ("sub/model.safetensors", "no safetensors file of this folder"),
        (".hidden.safetensors", "no safetensors file of this folder"),
        ("model\0.safetensors", "no safetensors file of this folder"),
        ("model\ud800.safetensors", "no safetensors file of this folder"),
        ("pytorch_model.bin", "no safetensors file of this folder"),
        ("m" * 300 + ".safetensors", "no safetensors file of this folder"),
        ("ž" * 200 + ".safetensors", "File name too long"),
        ("model-9.safetensors", "No such file"),
    ],
)
def test_an_index_that_names_what_is_not_of_its_folder(file: str, reason: str, campaign: Campaign) -> None:
    (campaign.guilty / "model.safetensors").unlink()
    index = {"weight_map": {**dict.fromkeys(model(2), "model-1.safetensors"), "norm": file}}
    (campaign.guilty / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(campaign.guilty / "other", model(2))
    (campaign.guilty / "other" / "model.safetensors").rename(campaign.guilty / "model-1.safetensors")
    campaign.refusal(reason)


@pytest.mark.parametrize("value", ["NaN", "Inf"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_values_that_are_no_numbers(value: str, dtype: str, threads: int, campaign: Campaign) -> None:
    """In the last place of the last chunk, as the gates at the fetch look at everything already."""
    tensors: list[dict[str, tuple[str, np.ndarray]]] = []
    for _ in range(3):
        values = np.linspace(-1, 1, 95)
        tensors.append({"w": (dtype, to_bf16(values) if dtype == "BF16" else values.astype(FLOATS[dtype]))})
    bad = np.array([float(value)], np.float32)
    tensors[2]["w"][1][-1] = to_bf16(bad)[0] & 0xFFC0 if dtype == "BF16" else bad[0]
    for folder, content in zip((campaign.base, *campaign.given), tensors, strict=True):
        for path in folder.glob("model*"):
            path.unlink()
        write_weights(folder, content)
    assert f"{campaign.guilty}: tensor 'w' holds {value}" in campaign.refusal(f"holds {value}").message


# What changes while it is read


def at_once(change: Callable[[], object]) -> Callable[[int], None]:
    """`change`, when the first bytes were written."""
    done: list[int] = []

    def progress(written: int) -> None:
        if not done:
            done.append(written)
            change()

    return progress


def aged(path: Path) -> Path:
    """As if written a second ago: file systems tell times only by the tick."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))
    return path


def test_a_contribution_that_is_overwritten_meanwhile(campaign: Campaign) -> None:
    path = aged(campaign.guilty / "model.safetensors")
    other = path.read_bytes()[:-8] + bytes(8)

    def overwrite() -> None:
        with path.open("r+b") as file:
            file.write(other)

    assert str(path) in campaign.refusal("changed while it was in use", progress=at_once(overwrite)).message


def test_a_contribution_that_shrinks_meanwhile(campaign: Campaign) -> None:
    path = aged(campaign.guilty / "model.safetensors")
    campaign.refusal("truncated", progress=at_once(lambda: os.truncate(path, path.stat().st_size - 1)))


def test_a_shard_that_is_replaced_before_it_is_opened(campaign: Campaign) -> None:
    (campaign.guilty / "model.safetensors").unlink()
    write_weights(campaign.guilty, model(2), {"embed": "1", "norm": "2", "steps": "2"})
    path = aged(campaign.guilty / "model-2.safetensors")

    def replace() -> None:
        (campaign.guilty / "new").write_bytes(path.read_bytes())
        (campaign.guilty / "new").rename(path)

    campaign.refusal("changed while it was in use", progress=at_once(replace))


def test_a_shard_that_vanishes_before_it_is_opened(campaign: Campaign) -> None:
    (campaign.guilty / "model.safetensors").unlink()
    write_weights(campaign.guilty, model(2), {"embed": "1", "norm": "2", "steps": "2"})
    path = campaign.guilty / "model-2.safetensors"
    assert str(path) in campaign.refusal("No such file", progress=at_once(path.unlink)).message


# Disks. A test mounts what it needs, as root


@contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", *arguments, str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def tmpfs(place: Path, options: str) -> "Iterator[Path]":
    return mounted(place, "-t", "tmpfs", "-o", options, "flctl-test")


@contextmanager
def ext4(image: Path, place: Path, size: int) -> Iterator[Path]:
    """A file system in a file, which is a hole but for the tables of the file system."""
    with image.open("wb") as file:
        file.truncate(size)
    options = ["-b", "4096", "-N", "64", "-O", "^has_journal", "-E", "lazy_itable_init=0"]
    subprocess.run(["mkfs.ext4", "-q", *options, str(image)], check=True)
    with mounted(place, "-o", "loop", str(image)) as found:
        yield found


def test_a_disk_on_which_the_model_has_no_room_is_not_written_to(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        campaign = Campaign(tmp_path, disk, rows=100_000)
        error = campaign.refusal(r"too full: 3,200,\d+ bytes are needed", BudgetRefused, None)
        assert f"make room in {disk}" in error.hint
        assert error.exit_code == 9


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_fills_up_meanwhile(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    made = tmpfs(place, "size=6m") if kind == "tmpfs" else ext4(tmp_path / "image", place, 12 << 20)
    with made as disk:
        campaign = Campaign(tmp_path, disk, rows=100_000)
        campaign.refusal("disk is full: No space left", BudgetRefused, None, at_once(lambda: fill(disk)))
        assert sorted(path.name for path in disk.iterdir() if path.name != "lost+found") == ["filler", "previous"]


def test_a_disk_that_takes_everything_and_is_full_when_it_must_keep_it(tmp_path: Path) -> None:
    """The file system promises 48 MB and lies in a file on a disk of 3 MB: every write succeeds, fsync does not."""
    with (
        tmpfs(tmp_path / "small", "size=3m") as small,
        ext4(small / "image", tmp_path / "disk", 48 << 20) as disk,
    ):
        campaign = Campaign(tmp_path, disk, rows=400_000)
        subprocess.run(["sync", "--file-system", str(disk)], check=True)
        campaign.refusal("disk is full: No space left", BudgetRefused, None)


def test_a_disk_without_room_for_one_more_file(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=6m,nr_inodes=6") as disk:
        campaign = Campaign(tmp_path, disk)
        campaign.refusal("No space left on device", BudgetRefused, None)


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=6m") as disk:
        campaign = Campaign(tmp_path, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        error = campaign.refusal("Read-only file system", ConfigurationError, None)
        assert str(campaign.draft) in error.message


def test_a_contribution_on_a_disk_with_bad_blocks(tmp_path: Path) -> None:
    campaign, image = Campaign(tmp_path, rows=100_000), tmp_path / "image"
    with ext4(image, tmp_path / "disk", 16 << 20) as disk:
        (campaign.guilty / "model.safetensors").rename(tmp_path / "model.safetensors")
        subprocess.run(["cp", str(tmp_path / "model.safetensors"), str(disk)], check=True)
        (campaign.guilty / "model.safetensors").symlink_to(disk / "model.safetensors")
        subprocess.run(["sync"], check=True)
        device = subprocess.run(["losetup", "-j", str(image)], capture_output=True, text=True, check=True).stdout

        def lose_the_rest() -> None:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            os.truncate(image, 1 << 20)
            subprocess.run(["losetup", "--set-capacity", device.split(":")[0]], check=True)

        error = campaign.refusal("Input/output error", progress=at_once(lose_the_rest))
        assert str(campaign.guilty / "model.safetensors") in error.message


def test_a_folder_in_which_nothing_may_be_written(campaign: Campaign) -> None:
    campaign.draft = campaign.models / "none" / "draft"
    campaign.refusal("No such file or directory", ConfigurationError, None)
    campaign.draft = campaign.base / "config.json" / "draft"
    campaign.refusal("Not a directory", ConfigurationError, None)


# Pickles

GUARDED = """
import sys
import torch
from pathlib import Path
from flctl.errors import AggregationRefused
from flctl.model.merge import Source, merge
from flctl.model.verify import check
root, opened = Path(sys.argv[1]), []
def guard(event, arguments):
    if event.startswith("pickle.") or event == "marshal.loads":
        raise RuntimeError(f"{event} {arguments}")
    if event == "open" and str(arguments[0]).startswith(sys.argv[1]):
        opened.append(arguments[0])
sys.addaudithook(guard)
sources = [Source(site="brno", number=1, folder=root / "out", weight=1)]
try:
    check(root / "out", root / "base", site="brno")
    merge(root / "base", sources, root / "draft")
    print("merged")
except AggregationRefused as error:
    print(error)
print(*opened, sep="\\n")
"""


class Bomb:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (str(self._path),)  # type: ignore[return-value]


def guarded(root: Path) -> list[str]:
    command = [sys.executable, "-c", GUARDED, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("place", ["base", "out"])
def test_a_pickle_in_place_of_the_weights_is_not_opened(place: str, tmp_path: Path) -> None:
    for folder in ("base", "out"):
        write_weights(tmp_path / folder, model(0))
    content = pickle.dumps(Bomb(tmp_path / "exploded"))
    (tmp_path / place / "model.safetensors").write_bytes(content)
    said, *_ = guarded(tmp_path)
    assert re.search(rf"{place}/model\.safetensors: (a header of \d+ bytes is too long|truncated)", said)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "draft").exists()
    pickle.loads(content)  # noqa: S301  that it would have
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "optimizer.pkl", "training_args.bin"])
def test_a_pickle_beside_the_weights_is_neither_opened_nor_carried(name: str, tmp_path: Path) -> None:
    for folder in ("base", "out"):
        write_weights(tmp_path / folder, model(0))
        (tmp_path / folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    said, *opened = guarded(tmp_path)
    assert said == "merged"
    assert not (tmp_path / "exploded").exists()
    assert any(path.endswith("model.safetensors") for path in opened)
    assert not any(path.endswith(name) for path in opened)
    assert [path.name for path in (tmp_path / "draft").iterdir()] == ["model.safetensors"]


def test_the_guard_of_these_tests_sees_a_pickle() -> None:
    command = GUARDED.split("sources =")[0] + "import os, pickle; pickle.loads(pickle.dumps(os.mkdir))"
    found = subprocess.run([sys.executable, "-c", command, "/"], capture_output=True, text=True, check=False)
    assert "RuntimeError: pickle.find_class" in found.stderr
