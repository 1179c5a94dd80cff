"""Profiles: what is read, what is refused, and in which words."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flctl.errors import ConfigurationError
from flctl.facility.fields import CODE_PROMPT, seconds_of
from flctl.facility.profile import Login, Scheduler, Shape, Site, load_site, missing
from flctl.facility.table import keys_of, load_table

SITES = Path(__file__).parent.parent / "sites"

WHOLE = """
schema = 1
name = "here"
[login]
host = "login.example.org"
user = "me"
[scheduler]
kind = "slurm"
account = "project"
partition = "gpu"
extra = ["--mem=0"]
[shapes.prod]
walltime = "1-00:00:00"
[shapes.debug]
walltime = "30:00"
qos = "debug"
extra = ["--constraint=a100"]
[storage]
work = "$WORK/flctl"
data = "/data/it"
[train]
lr = 1e-3
layers = [1, 2]
"""


def load(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "here.toml"
    path.write_text(text, encoding="utf-8")
    return load_site(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "here.toml") in caught.value.message
    assert str(tmp_path / "here.toml") in caught.value.hint
    return caught.value.message


def changed(old: str, new: str) -> str:
    assert old in WHOLE
    return WHOLE.replace(old, new, 1)


def test_a_whole_profile_is_read_with_its_types(tmp_path: Path) -> None:
    site = load(tmp_path, WHOLE)
    assert site.login == Login(host="login.example.org", user="me")
    assert site.scheduler == Scheduler(kind="slurm", account="project", partition="gpu", extra=("--mem=0",))
    assert site.shapes["prod"].walltime == 86400
    assert site.train == {"lr": 1e-3, "layers": [1, 2]}
    assert missing(site) == []


def test_the_default_shape_takes_from_the_scheduler_what_it_leaves_open(tmp_path: Path) -> None:
    text = changed('kind = "slurm"', 'kind = "slurm"\nshape = "debug"')
    assert load(tmp_path, text).shape == Shape(
        walltime=1800, account="project", partition="gpu", qos="debug", extra=("--mem=0", "--constraint=a100")
    )


@pytest.mark.parametrize("path", sorted(SITES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_profiles_load(path: Path) -> None:
    site = load_site(path)
    assert site.name == path.stem
    assert "login.user" in missing(site)
    for shape in site.shapes:
        scheduler = dataclasses.replace(site.scheduler, shape=shape)
        assert dataclasses.replace(site, scheduler=scheduler).shape.walltime >= 60


def test_example_toml_explains_every_key() -> None:
    """A key is there as `key =` in its own table, or behind a comment sign where it cannot be set for all."""
    found, table = set(), ""
    for line in (SITES / "example.toml").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(?:# )?\[([\w.]+)\]", line):
            table = match[1].replace("shapes.prod", "shapes.*").replace("queues.batch", "queues.*")
            found.add(table)
        elif match := re.match(r"(?:# )?(\w+) = .*", line):
            found.add(f"{table}.{match[1]}".removeprefix("."))
    known = {".".join(place) for place in keys_of(Site)} - {"shapes", "queues"}
    assert known - found == set()
    assert {key for key in found if not key.startswith(("train.", "shapes.*", "queues.*"))} <= known


def test_the_values_in_example_toml_are_the_defaults() -> None:
    """Only what has no default, or is still to be filled in, differs."""
    site = load_site(SITES / "example.toml")
    bare = Site(schema=1, name="bare", scheduler=Scheduler(kind="slurm"), shapes={"prod": Shape()})
    differing = set()
    for table in ("about", "login", "transfer", "scheduler", "environment", "budget", "poll"):
        given, default = getattr(site, table), getattr(bare, table)
        differing |= {
            f"{table}.{field.name}"
            for field in dataclasses.fields(given)
            if getattr(given, field.name) != getattr(default, field.name)
        }
    assert differing == {"login.host", "scheduler.account"}
    assert site.shapes == bare.shapes


def test_an_unknown_key_names_the_nearest_right_one(tmp_path: Path) -> None:
    text = changed('host = "login', 'hosts = "login')
    assert "login.hosts: unknown key; did you mean login.host?" in refusal(tmp_path, text)
    assert "shapes.prod.wall_time: unknown key; did you mean shapes.prod.walltime?" in refusal(
        tmp_path, changed("[shapes.prod]\nwalltime", "[shapes.prod]\nwall_time")
    )
    assert "shape: unknown key; did you mean shapes?" in refusal(tmp_path, WHOLE.replace("[shapes.", "[shape."))
    text = changed('host = "login', 'jump = "ela.cscs.ch"\nhost = "login')
    assert "login.jump: unknown key; did you mean login.proxy_jump?" in refusal(tmp_path, text)
    text = changed('kind = "slurm"', 'kind = "slurm"\nreservation = "R12"')
    told = "scheduler.reservation: must be a table, which may hold: name, start, end"
    assert told in refusal(tmp_path, text)
    text = WHOLE + "[login.totp]\nzzz = 1\n"
    assert "login.totp.zzz: unknown key; known here: automation," in refusal(tmp_path, text)


def test_several_problems_are_told_at_once_one_per_line(tmp_path: Path) -> None:
    text = changed('user = "me"', 'user = "a b"\nport = "22"').replace('kind = "slurm"', 'kind = "slum"')
    lines = refusal(tmp_path, text).splitlines()
    assert lines[0].endswith("3 problems")
    assert lines[1:] == [
        "  login.port: must be a whole number",
        "  login.user: 'a b' is not a user name",
        "  scheduler.kind: must be 'slurm', 'pbs' or 'local'",
    ]


WRONG = [
    ('account = "project"', 'account = "a\\n#SBATCH --wrap=id"', "scheduler.account: holds the control character"),
    ('account = "project"', 'account = "a\\u0085b"', "scheduler.account: holds the control character"),
    ('account = "project"', 'account = "a b"', "scheduler.account: 'a b' is not a name"),
    ('account = "project"', 'account = "-p"', "scheduler.account"),
    ('host = "login.example.org"', 'host = "-oProxyCommand=id"', "login.host: "),
    ('host = "login.example.org"', 'host = "a;id"', "login.host: "),
    ('user = "me"', 'user = "-l"', "login.user: "),
    ('user = "me"', "port = 0", "login.port: 0 is not between 1 and 65535"),
    ('user = "me"', 'proxy_jump = "a b"', "login.proxy_jump: 'a b' is not [user@]host[:port]"),
    ('user = "me"', 'host_keys = ["MD5:aa"]', "login.host_keys (item 1): 'MD5:aa' is not a fingerprint"),
    ('user = "me"', 'key = "~/$(id)"', "login.key: "),
    ('work = "$WORK/flctl"', 'work = "$WORK/$(id)"', "storage.work: "),
    ('work = "$WORK/flctl"', 'work = "/a/`id`"', "storage.work: "),
    ('work = "$WORK/flctl"', "work = \"/a/'b'\"", "storage.work: "),
    ('work = "$WORK/flctl"', 'work = "/a/${B:-c}"', "storage.work: "),
    ('work = "$WORK/flctl"', 'work = "flctl"', "storage.work: 'flctl' is not an absolute path"),
    ('work = "$WORK/flctl"', 'work = "/mnt/<project>"', "storage.work: "),
    ('walltime = "30:00"', "walltime = 30", "shapes.debug.walltime: 30 is not a time"),
    ('walltime = "30:00"', "walltime = 00:30:00", "shapes.debug.walltime: dates and times are not used here"),
    ('walltime = "30:00"', 'walltime = "00:00:00"', "shapes.debug.walltime: '00:00:00' is not a time"),
    ('walltime = "30:00"', "nodes = true", "shapes.debug.nodes: must be a whole number"),
    ('extra = ["--mem=0"]', 'extra = ["--mem=0; id"]', "scheduler.extra (item 1): "),
    ('extra = ["--mem=0"]', 'extra = ["--requeue"]', "--requeue is set by the job template"),
    ('extra = ["--mem=0"]', 'extra = ["--time=1"]', "--time is set by the job template"),
    ("lr = 1e-3", "lr = nan", "train.lr: nan is not a finite number"),
    ("lr = 1e-3", 'lr = "a\\u001b[2J"', "train.lr: holds the control character"),
    ("schema = 1", "schema = 2", "schema: must be 1"),
    ("schema = 1", "", "schema: is missing"),
    ('name = "here"', 'name = "there"', "name: 'there' must be the file's own name, 'here'"),
    ('name = "here"', 'name = "../here"', "name: "),
]


@pytest.mark.parametrize(("old", "new", "reason"), WRONG, ids=[case[1] or case[0] for case in WRONG])
def test_a_wrong_value_names_key_and_reason(tmp_path: Path, old: str, new: str, reason: str) -> None:
    assert reason in refusal(tmp_path, changed(old, new))


ENVIRONMENT = [
    ('modules = ["a; id"]', "environment.modules (item 1): 'a; id' is not a module's name"),
    ('seal_python = "$HOME/python"', "environment.seal_python: "),
    ('python = "python3 -u"', "environment.python: "),
    ('launch = "srun $(id)"', "environment.launch: "),
    ('proxy = "proxy:3128"', "environment.proxy: 'proxy:3128' is not a proxy"),
    ('exports = { "A B" = "1" }', "environment.exports: 'A B' is not a variable"),
    ('exports = { FLCTL_OUT = "1" }', "environment.exports: 'FLCTL_OUT' is not a variable"),
    ('exports = { A = "$(id)" }', "environment.exports: A may hold $NAME"),
    ('activate = [". a\\nid"]', "environment.activate (item 1): holds the control character"),
]


@pytest.mark.parametrize(("line", "reason"), ENVIRONMENT, ids=[case[0] for case in ENVIRONMENT])
def test_nothing_of_the_environment_runs_more_than_it_says(tmp_path: Path, line: str, reason: str) -> None:
    assert reason in refusal(tmp_path, f"{WHOLE}[environment]\n{line}\n")


CONTRADICTIONS = [
    ('kind = "slurm"', 'kind = "slurm"\nshape = "debg"', "there is no [shapes.debg]; did you mean 'debug'?"),
    ('user = "me"', 'certificate = "~/a-cert.pub"', 'login.certificate: needs login.kind = "certificate"'),
    ('user = "me"', 'kind = "certificate"\ncertificate = "~/a-cert.pub"', "login.certificate: needs login.key"),
    ('user = "me"', 'totp.automation = "permitted"', "login.totp.automation: needs a login.kind with totp in it"),
    ('user = "me"', 'kind = "key+totp"\ntotp.automation = "permitted"', "login.totp.permission: must say"),
    ("schema = 1", 'schema = 1\nconnection = "local"', 'login.host: must be left out where connection = "local"'),
    ("schema = 1", "schema = 1\ntransfer.shell = false", "transfer.shell: only a transfer host of its own"),
]


@pytest.mark.parametrize(("old", "new", "reason"), CONTRADICTIONS, ids=[case[2] for case in CONTRADICTIONS])
def test_values_that_contradict_each_other_are_refused(tmp_path: Path, old: str, new: str, reason: str) -> None:
    assert reason in refusal(tmp_path, changed(old, new))


SECRETS = [
    'totp.secret = "JBSWY3DPEHPK3PXP"',
    'totp.secret = "jbsw y3dp ehpk 3pxp"',
    'totp.secret = "otpauth://totp/a?secret=JBSWY3DPEHPK3PXP"',
    'totp.secret = "env:A-B"',
    'key = "-----BEGIN OPENSSH PRIVATE KEY-----JBSWY3DPEHPK3PXP"',
]


@pytest.mark.parametrize("line", SECRETS)
def test_a_secret_is_refused_and_never_repeated(tmp_path: Path, line: str) -> None:
    message = refusal(tmp_path, changed('user = "me"', f'kind = "key+totp"\n{line}'))
    assert "command:" in message and "file:" in message and "env:" in message and "keyring:" in message
    assert "3pxp" not in message.lower()


@pytest.mark.parametrize("reference", ["command:pass show totp", "file:~/a b.totp", "env:CODE_SECRET", "keyring:a/b"])
def test_a_reference_to_a_secret_is_read(tmp_path: Path, reference: str) -> None:
    site = load(tmp_path, changed('user = "me"', f'kind = "key+totp"\ntotp.secret = "{reference}"'))
    assert site.login.totp.secret == reference


def test_toml_errors_name_file_and_line(tmp_path: Path) -> None:
    assert "line 3" in refusal(tmp_path, 'schema = 1\nname = "here"\nx == 1\n')


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "here.toml").write_bytes(b'name = "\xff"\n')
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        load_site(tmp_path / "here.toml")
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        load_site(tmp_path / "nowhere.toml")


def test_missing_names_what_is_still_to_be_filled_in(tmp_path: Path) -> None:
    text = WHOLE.replace('"me"', '""').replace('"project"', '""').replace('"/data/it"', '""')
    assert missing(load(tmp_path, text)) == ["login.user", "scheduler.account", "storage.data"]


def test_an_account_that_is_not_mentioned_is_not_missing(tmp_path: Path) -> None:
    assert missing(load(tmp_path, changed('account = "project"\n', ""))) == []


def test_a_local_site_needs_no_login(tmp_path: Path) -> None:
    text = WHOLE.replace("schema = 1", 'schema = 1\nconnection = "local"').replace('host = "login.example.org"', "")
    assert missing(load(tmp_path, text.replace('user = "me"', ""))) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:30:00", 1800),
        ("30:00", 1800),
        ("01:00", 60),
        ("48:00:00", 172800),
        ("4-00:00:00", 345600),
        ("1-1:01:01", 90061),
    ],
)
def test_walltimes_are_read_as_schedulers_write_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "1:60:00", "00:61", "1:2", "-1:00", "1-30:00:00:00", "٣:00", 60])
def test_other_walltimes_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        seconds_of(text)


PROMPTS = {
    "Verification code: ": True,
    "One-time password (OATH) for `me': ": True,
    "Enter your TOTP: ": True,
    "Password: ": False,
    "Password & verification code: ": False,
    "New one-time password: ": False,
    "Enter passphrase for key: ": False,
    "Duo two-factor login. Passcode or option (1-3): ": False,
}


@pytest.mark.parametrize(("prompt", "answered"), PROMPTS.items())
def test_only_a_question_for_a_code_matches_the_default_prompt(prompt: str, answered: bool) -> None:
    assert bool(re.search(CODE_PROMPT, prompt)) == answered


def test_any_dataclass_may_be_a_table(tmp_path: Path) -> None:
    """flctl.toml is read by the same function: plain dataclasses, without a mark of pydantic's."""
    path = tmp_path / "plan.toml"
    path.write_text("nodes = 2\nwalltime = '01:00'\n")
    assert load_table(path, Shape) == Shape(nodes=2, walltime=60)
    path.write_text("node = 2\n")
    with pytest.raises(ConfigurationError, match="node: unknown key; did you mean nodes"):
        load_table(path, Shape)


def test_the_module_loads_without_pydantic() -> None:
    code = "import sys, flctl.facility.profile; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
