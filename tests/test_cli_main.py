"""The program as typed: arguments, one clear error and its exit code, one JSON object, nothing heavy for nothing."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flctl import __version__, errors
from flctl.cli.main import expand
from tests.campaigns import Campaign

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """One campaign for tests that change nothing, or put back what they change."""
    return Campaign(tmp_path_factory.mktemp("cli"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("round --sites a b --rounds 2", "round --sites a --sites b --rounds 2"),
        ("round --sites a,b", "round --sites a --sites b"),
        ("round --sites=a,b --json", "round --sites a --sites b --json"),
        ("round --sites a, b -- c", "round --sites a --sites b -- c"),
        ("init DIR --sites a b --model M", "init DIR --sites a --sites b --model M"),
        ("status -C DIR", "-C DIR status"),
        ("round --sites a -C DIR --steps 3", "-C DIR round --sites a --steps 3"),
        ("campaign tick --campaign=DIR", "--campaign=DIR campaign tick"),
    ],
)
def test_lists_may_be_written_as_people_write_them(typed: str, meant: str) -> None:
    assert expand(typed.split()) == meant.split()


@pytest.mark.parametrize(
    "typed", ["round --sites", "round --sites=", "round --sites , --json", "init d --sites --model m"]
)
def test_a_list_without_a_name_in_it_is_refused(typed: str) -> None:
    """`--sites $UNSET` must not mean every site."""
    with pytest.raises(errors.UsageError):
        expand(typed.split())


def test_the_version_is_said_wherever_one_is(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "flctl.cli.main", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"flctl {__version__}\n", "")


def all_errors() -> list[type[errors.FlctlError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FlctlError)]


def test_every_error_of_the_tree_is_drawn_with_its_exit_code() -> None:
    drawing = errors.__doc__ or ""
    for kind in all_errors():
        line = next(line for line in drawing.splitlines() if kind.__name__ in line)
        assert f" {kind.exit_code}  " in line, kind


def test_of_several_errors_the_first_of_the_table_counts() -> None:
    assert errors.exit_code_of([11, 8, 6, 5]) == 5
    assert errors.exit_code_of([8, 6]) == 6
    assert errors.exit_code_of([4, 12]) == 12
    assert errors.exit_code_of([]) == 0


HEAVY = ("torch", "transformers", "numpy", "paramiko", "fabric", "pydantic", "cryptography")


def loaded(campaign: Campaign, *words: str) -> set[str]:
    """The heavy modules that a command has loaded when it ends."""
    program = f"import sys, atexit\nsys.argv = {['flctl', *words]!r}\n"
    program += f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
    program += "from flctl.cli.main import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", program], cwd=campaign.place, capture_output=True, text=True)
    return set(eval(ran.stderr.splitlines()[-1]))  # noqa: S307  our own line


def test_help_and_status_load_nothing_heavy(campaign: Campaign) -> None:
    assert loaded(campaign, "--help") == set()
    for words in (["status"], ["status", "--json"], ["history"]):
        assert loaded(campaign, *words) <= {"pydantic"}, "typer itself uses pydantic where it is installed"


def test_an_idle_tick_loads_no_torch(campaign: Campaign) -> None:
    assert loaded(campaign, "campaign", "tick") & {"torch", "transformers", "paramiko"} == set()


def test_a_tick_that_only_submits_loads_no_torch(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno",))
    campaign.profile("brno", seconds=20)
    campaign.flctl("campaign", "start", "--rounds", "1")
    assert loaded(campaign, "campaign", "tick") & {"torch", "transformers", "numpy"} == set()
    assert campaign.run("brno")["stage"] in ("queued", "running")
    campaign.flctl("cancel")


def test_a_usage_error_is_one_line_and_2(campaign: Campaign) -> None:
    ran = campaign.flctl("round", "--rounds", "none")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert "--rounds" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert campaign.flctl("nosuch").returncode == 2


def test_with_json_an_error_is_one_object_too(campaign: Campaign) -> None:
    ran = campaign.flctl("round", "--wait", "soon", "--json")
    answer = json.loads(ran.stdout)
    assert (answer["command"], answer["status"], answer["exit_code"], ran.returncode) == ("round", "error", 2, 2)
    assert answer["errors"][0]["code"] == "usage"
    assert set(answer) == {"schema_version", "command", "status", "exit_code", "data", "errors"}
    assert set(answer["errors"][0]) == {"code", "site", "message", "hint"}


def test_outside_a_campaign_the_way_in_is_told(tmp_path: Path, campaign: Campaign) -> None:
    ran = campaign.flctl("status", at=tmp_path)
    assert ran.returncode == 3
    assert "flctl init" in ran.stderr


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("min_sites = 0", "min_site = 0", ["campaign.min_site", "min_sites"]),
        ('rule = "fedavg"', 'rule = "fedavh"', ["aggregation.rule", "fedavg"]),
        ("steps = 4", 'steps = "many"', ["train.steps"]),
        ("[policy]", "[polcy]", ["polcy", "policy"]),
        ("seed = 0", "seed = = 0", ["line"]),
    ],
)
def test_a_wrong_key_of_flctl_toml_is_named_with_file_and_reason(
    campaign: Campaign, old: str, new: str, words: list[str]
) -> None:
    campaign.set(old, new)
    try:
        ran = campaign.flctl("round")
    finally:
        campaign.set(new, old)
    assert ran.returncode == 3, ran.stderr
    assert "Traceback" not in ran.stderr
    for word in ["flctl.toml", *words]:
        assert word in ran.stderr


def test_a_wrong_key_of_a_profile_is_named_before_anything_starts(campaign: Campaign) -> None:
    path = campaign.place / "sites" / "pisa.toml"
    text = path.read_text()
    path.write_text(text.replace("[storage]", "[storrage]"))
    ran = campaign.flctl("round")
    path.write_text(text)
    assert ran.returncode == 3
    assert "storrage" in ran.stderr
    assert "storage" in ran.stderr
    assert not (campaign.place / "plan.json").exists()


def test_init_copies_profiles_and_templates_and_says_what_to_fill_in(campaign: Campaign) -> None:
    place = campaign.root / "shipped"
    ran = campaign.flctl("init", str(place), "--sites", "leonardo", "karolina", "--model", str(campaign.root / "start"))
    assert ran.returncode == 0, ran.stderr
    for word in ("leonardo.toml: ", "login.user", "scheduler.account", "flctl site test", "flctl round"):
        assert word in ran.stdout
    assert {path.name for path in place.iterdir()} == {
        *("flctl.toml", "sites", "templates", "models", "runs", "known_hosts", "journal.jsonl")
    }
    assert {path.name for path in (place / "templates").iterdir()} == {"slurm.sh", "pbs.sh", "local.sh"}
    assert (place / "models" / "0000" / "tokenizer.json").exists()
    of_sites = ["round", "round --dry-run", "plan --offline", "campaign start --rounds 1"]
    of_one = ["login leonardo", "auth test leonardo", "site test leonardo", "site stage leonardo --model"]
    for command in [*(f"{words} --sites leonardo" for words in of_sites), *of_one]:
        refused = campaign.flctl(*command.split(), at=place)
        assert refused.returncode == 3, command
        assert "leonardo.toml still lacks: login.user, scheduler.account, storage.data\n" in refused.stderr, command
        assert "  -> fill them in; flctl site show leonardo tells more\n" in refused.stderr, command


@pytest.mark.parametrize(("name", "hint"), [("pissa", "did you mean pisa?"), ("lumi", "flctl site add lumi")])
def test_a_site_that_the_campaign_lacks_is_3_and_what_to_type_is_said(campaign: Campaign, name: str, hint: str) -> None:
    for command in ("login", "auth test", "site test", "plan --offline --sites", "round --dry-run --sites"):
        ran = campaign.flctl(*command.split(), name)
        assert ran.returncode == 3, command
        assert f"this campaign has no site {name!r}; it has: brno, pisa\n  -> {hint}\n" in ran.stderr, command


@pytest.mark.parametrize(("fingerprint", "code"), [("SHA256:x", 2), ("MD5:" + "a" * 43, 2), ("SHA256:" + "a" * 43, 5)])
def test_a_fingerprint_and_its_host_are_looked_at_before_a_key_is_distrusted(
    campaign: Campaign, fingerprint: str, code: int
) -> None:
    profile = campaign.place / "sites" / "brno.toml"
    before = profile.read_text()
    login = '[login]\nhost = "127.0.0.95"\nport = 2950\nuser = "me"\n\n[scheduler]'
    profile.write_text(before.replace('connection = "local"', "").replace("[scheduler]", login))
    try:
        ran = campaign.flctl("site", "trust", "brno", fingerprint)
        assert ran.returncode == code and "  -> " in ran.stderr
        assert ("is no fingerprint" in ran.stderr) == (code == 2)
    finally:
        profile.write_text(before)


def test_init_fills_the_empty_folder_one_stands_in(campaign: Campaign) -> None:
    place = campaign.root / "Můj první"
    place.mkdir()
    ran = campaign.flctl("init", ".", "--sites", "leonardo", "--model", str(campaign.root / "start"), at=place)
    assert ran.returncode == 0, ran.stderr
    assert campaign.flctl("status", at=place).returncode == 0
    shown = campaign.flctl("round", "--dry-run", at=place)
    assert shown.returncode == 3, "user and account are not filled in"
    path = place / "sites" / "leonardo.toml"
    path.write_text(
        path.read_text()
        .replace('user = ""', 'user = "me"')
        .replace('account = ""', 'account = "acc"')
        .replace('data = ""', 'data = "$WORK/it"')
    )
    shown = campaign.flctl("round", "--dry-run", at=place)
    assert shown.returncode == 0, shown.stderr
    assert "/_WORK_/" in shown.stdout
    assert 'name = "muj-prvni"' in (place / "flctl.toml").read_text()
    assert not (place / "plan.json").exists()


def test_init_never_overwrites(campaign: Campaign) -> None:
    before = (campaign.place / "flctl.toml").read_text()
    ran = campaign.flctl("init", str(campaign.place), "--sites", "leonardo", "--model", str(campaign.root / "start"))
    assert ran.returncode == 3
    assert "nothing is overwritten" in ran.stderr
    assert (campaign.place / "flctl.toml").read_text() == before


@pytest.mark.parametrize(("site", "words"), [("leonrado", "leonardo"), ("nowhere.toml", "nowhere.toml")])
def test_init_leaves_nothing_behind_when_it_fails(campaign: Campaign, site: str, words: str) -> None:
    place = campaign.root / "failed"
    ran = campaign.flctl("init", str(place), "--sites", site, "--model", str(campaign.root / "start"))
    assert ran.returncode == 3
    assert words in ran.stderr
    assert not place.exists()


def test_init_refuses_other_weights_with_the_way_to_convert_them(campaign: Campaign) -> None:
    model = campaign.root / "old"
    model.mkdir(exist_ok=True)
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "config.json").write_text('{"model_type": "llama"}')
    ran = campaign.flctl("init", str(campaign.root / "failed"), "--sites", "leonardo", "--model", str(model))
    assert ran.returncode == 3
    assert "save_pretrained" in ran.stderr


def test_the_cron_texts_are_right(campaign: Campaign, tmp_path: Path) -> None:
    """The crontab line runs in cron's environment; the units pass systemd's own checker."""
    state = tmp_path / "state 100%"
    ran = campaign.flctl("campaign", "cron", "--every", "7", XDG_STATE_HOME=str(state))
    assert ran.returncode == 0
    assert not (state / "flctl").exists()
    lines = ran.stdout.splitlines()
    crontab = next(line for line in lines if line.startswith("*/7 * * * * "))
    command = crontab.split(" ", 5)[5].replace(r"\%", "%")
    done = subprocess.run(["/bin/sh", "-c", command], env={"HOME": "/", "PATH": "/usr/bin:/bin"}, cwd="/")
    assert done.returncode == 0, (campaign.place / "tick.log").read_text()
    assert (state / "flctl").is_dir()  # where logins and codes are remembered: one place for whoever moves the campaign
    name, text = "", {}
    for line in lines[lines.index(crontab) + 1 :]:
        if line.startswith("# ~/.config/systemd/user/"):
            name = line.rsplit("/", 1)[1]
        elif name and not line.startswith("#"):
            text[name] = text.get(name, "") + line + "\n"
    assert len(text) == 2
    for unit, content in text.items():
        (tmp_path / unit).write_text(content)
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit) for unit in text)],
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stderr
    assert verified.stderr == ""


def test_a_wheel_has_templates_sites_and_payload(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(words, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"flctl/shipped/templates/{path.name}" for path in (ROOT / "templates").iterdir()}
    wanted |= {f"flctl/shipped/sites/{path.name}" for path in (ROOT / "sites").iterdir()}
    wanted |= {f"flctl/payload/{name}" for name in ("seal.py", "batch.py", "train.py")}
    assert wanted <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    listed = subprocess.run(
        [sys.executable, "-m", "flctl.cli.main", "site", "show", "lumi"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert listed.stdout.splitlines()[-1] == str(tmp_path / "installed/flctl/shipped/sites/lumi.toml"), listed.stderr


def test_a_terminal_shows_a_live_table(tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    campaign = Campaign(tmp_path, sites=("brno",))
    campaign.profile("brno", seconds=3)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    process = subprocess.Popen(
        campaign.words("round"),
        cwd=campaign.place,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "140"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass
    assert process.wait() == 0
    text = shown.decode(errors="replace")
    for word in ("model 0001 is being made", "brno", "running", "perplexity of the base", "model 0001  sha256"):
        assert word in text
