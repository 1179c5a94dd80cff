"""The shipped profiles: whole, dated, honest about what is not known, with jobs that could be submitted."""

import dataclasses
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from flctl.campaign.profiles import to_fill_in
from flctl.facility.limits import too_much
from flctl.facility.profile import Site, load_site, missing
from flctl.facility.script import job_script
from tests import facilities_page

ROOT = Path(__file__).parent.parent
SITES = ROOT / "sites"
FACILITIES = (
    *("alps-clariden", "aurora", "delta", "frontier", "jupiter", "juwels-booster", "karolina", "leonardo", "lumi"),
    *("marenostrum5", "meluxina", "perlmutter", "polaris", "snellius"),
)

# As the facilities publish them: login host, transfer host.
FINGERPRINTS: dict[str, tuple[set[str], set[str]]] = {
    "delta": (
        {
            "SHA256:mIv7OqNSuuWnu1tlY//wG4gWAn4z0mbE11KkBXDAY/g",
            "SHA256:u1Er7JjQeq/lEPnVfZrHxkLRVRhxCyG6XgVN9sZd7ps",
            "SHA256:CHs2pS8uq9VEMYfjpiEkQnP14EGy0yc2l3Z50mC3wVc",
        },
        set(),
    ),
    "frontier": (
        {
            "SHA256:ALuNAoAykEUIJzwsExhCaTqwrqhnd4fssvVB4xK87bs",
            "SHA256:bGyAOAnp4kfmmi23HRwqqJPWo7A6zDsUFpot9jqTR1U",
            "SHA256:vIjuRocIuWExV4+htXgNKNAuFU16JL0opb6T4ajcfHk",
        },
        {
            "SHA256:svTxlziE4JOmVlvLp9PIa3uSHZdGokM/7EU8T6f6x0A",
            "SHA256:ITEbdZ0ddYNJJehefOh+/0JMgSvHwClpr+P+kak58Xc",
            "SHA256:xAIWJhey/RCjetTR4Hll2GNE9WwCNrMUEOdyDhIeHeE",
        },
    ),
    "karolina": (
        {
            "SHA256:zKEtQMi2KRsxzzgo/sHcog+NFZqQ9tIyvJ7BVxOfzgI",
            "SHA256:Ip37d/bE6XwtWf3KnWA+sqA+zRGSFlf5vXai0v3MBmo",
        },
        set(),
    ),
    "lumi": (
        {
            "SHA256:qCFZThjRw8nf0CiZ9rU7b6Zirjq8slAIl5r0xWaVoD0",
            "SHA256:ypbqdMWtk9ZdXEROkeEpv+3PCEXWjPLGI79IXGHe9ac",
            "SHA256:hY4mnRCYb8bRchTnVcFo7SqoHHHEsUh9Ym38F4sHN1Y",
        },
        set(),
    ),
}

# What the facility demands of every job, as it documents it.
DIRECTIVES = {
    "aurora": ("#PBS -l filesystems=home:flare", "#PBS -l place=scatter", "#PBS -l select=1"),
    "delta": ("#SBATCH --mem=58g", "#SBATCH --gpus-per-node=1"),
    "frontier": ("#SBATCH --partition=extended", "#SBATCH --ntasks-per-node=8", "#SBATCH --cpus-per-task=7"),
    "jupiter": ("#SBATCH --gres=gpu:4",),
    "juwels-booster": ("#SBATCH --gres=gpu:4",),
    "karolina": ("#SBATCH --gpus-per-node=1", "#SBATCH --cpus-per-task=16"),
    "leonardo": ("#SBATCH --cpus-per-task=8", "#SBATCH --mem=123500"),
    "lumi": ("#SBATCH --cpus-per-task=7",),
    "meluxina": ("#SBATCH --gpus-per-node=4",),
    "marenostrum5": ("#SBATCH --qos=acc_ehpc", "#SBATCH --cpus-per-task=20"),
    "perlmutter": ("#SBATCH --constraint=gpu", "#SBATCH --qos=regular"),
    "polaris": ("#PBS -l filesystems=home:eagle", "#PBS -l place=scatter", "#PBS -l select=1"),
}


def profile(name: str) -> Site:
    return load_site(SITES / f"{name}.toml")


def with_shape(site: Site, shape: str) -> Site:
    return dataclasses.replace(site, scheduler=dataclasses.replace(site.scheduler, shape=shape))


def filled(site: Site) -> Site:
    """The profile after its user has filled in what is empty."""
    account = site.scheduler.account
    return dataclasses.replace(
        site,
        login=dataclasses.replace(site.login, user="me"),
        scheduler=dataclasses.replace(site.scheduler, account="project_1" if account == "" else account),
        storage=dataclasses.replace(site.storage, work=site.storage.work or "/work/me", data="/work/texts"),
    )


def script_of(site: Site) -> str:
    run = PurePosixPath("/work/me/campaign/runs/0001-1")
    return job_script(
        site,
        (ROOT / "templates" / f"{site.scheduler.kind}.sh").read_text(),
        token="f0123456789",
        campaign="campaign",
        run=run,
        workdir=run.parent.parent,
        payload=run.parent.parent / "payload",
        data=site.storage.data,
        now=0.0,
    )


def every_shape() -> list[tuple[str, str]]:
    return [(name, shape) for name in FACILITIES for shape in profile(name).shapes]


def test_there_is_a_profile_of_every_facility_and_of_no_other() -> None:
    assert sorted(path.stem for path in SITES.glob("*.toml")) == sorted((*FACILITIES, "example"))


@pytest.mark.parametrize("name", FACILITIES)
def test_a_profile_says_what_it_rests_on(name: str) -> None:
    site = profile(name)
    assert site.name == name and site.title
    assert site.about.docs.startswith("https://")
    assert site.about.checked and site.about.evidence


@pytest.mark.parametrize("name", FACILITIES)
def test_what_is_unverified_leaves_a_question_open(name: str) -> None:
    text = (SITES / f"{name}.toml").read_text(encoding="utf-8")
    marked = text.replace('marked "unverified"', "").count("unverified")
    assert marked
    assert len(profile(name).about.questions) >= 3


@pytest.mark.parametrize("name", FACILITIES)
def test_the_first_lines_name_what_is_to_be_filled_in(name: str) -> None:
    head = (SITES / f"{name}.toml").read_text(encoding="utf-8").split("\nschema")[0]
    listed = set(re.findall(r"(?:login|scheduler|storage)\.\w+", head.split("Fill in:")[1].split("sites/example")[0]))
    assert set(to_fill_in(profile(name))) <= listed
    assert missing(filled(profile(name))) == []


@pytest.mark.parametrize("name", FACILITIES)
def test_a_profile_holds_nobody_s_name_and_nobody_s_secret(name: str) -> None:
    site = profile(name)
    assert site.login.user == "" and not site.scheduler.account
    assert site.login.totp.secret == "" and site.login.password.secret == ""
    assert site.login.totp.automation == "forbidden", "only the user can know that the facility permits it"
    assert site.login.hold == 0, "only the user can know that the facility allows it"


@pytest.mark.parametrize("name", FACILITIES)
def test_published_host_keys_are_in_place(name: str) -> None:
    site = profile(name)
    assert (set(site.login.host_keys), set(site.transfer.host_keys)) == FINGERPRINTS.get(name, (set(), set()))


@pytest.mark.parametrize(("name", "shape"), every_shape())
def test_every_shape_fits_the_limits_of_its_own_queue(name: str, shape: str) -> None:
    assert too_much(with_shape(profile(name), shape), now=0.0) == ()


def test_a_shape_that_is_too_long_is_told_the_queue_that_takes_it() -> None:
    """The example that this house was asked for: 4 nodes for 6 hours at Frontier."""
    site = profile("frontier")
    shape = dataclasses.replace(site.shapes["short"], nodes=4, walltime=6 * 3600)
    asked = with_shape(dataclasses.replace(site, shapes={"long": shape}), "long")
    assert too_much(asked, now=0.0) == ("4 nodes for 6:00:00: batch allows 2:00:00; use extended",)


@pytest.mark.parametrize(("name", "shape"), every_shape())
def test_the_job_script_of_every_shape_is_one_that_bash_reads(name: str, shape: str, tmp_path: Path) -> None:
    script = script_of(with_shape(filled(profile(name)), shape))
    path = tmp_path / "job.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    assert "{{" not in "\n".join(line for line in script.splitlines() if not line.lstrip().startswith("# "))


@pytest.mark.parametrize("name", FACILITIES)
def test_the_job_script_asks_for_what_the_facility_demands(name: str) -> None:
    site = filled(profile(name))
    lines = script_of(site).splitlines()
    assert set(DIRECTIVES.get(name, ())) <= set(lines)
    asked = {"slurm": "#SBATCH --account=project_1", "pbs": "#PBS -A project_1"}[site.scheduler.kind]
    assert (asked in lines) == (site.scheduler.account is not None)
    if site.environment.proxy:
        assert any("https_proxy=" in line for line in lines)


def test_logins_are_of_the_kind_that_the_facility_has() -> None:
    kinds = {
        "certificate": {"alps-clariden", "leonardo", "perlmutter"},
        "key": {"karolina", "lumi", "marenostrum5", "meluxina", "snellius"},
        "key+totp": {"jupiter", "juwels-booster"},
        "attended": {"aurora", "delta", "frontier", "polaris"},
    }
    assert {kind: {name for name in FACILITIES if profile(name).login.kind == kind} for kind in kinds} == kinds
    for name in kinds["certificate"]:
        assert profile(name).login.renew and not profile(name).login.renew_unattended


def test_the_odd_ones_are_as_the_facility_has_them() -> None:
    assert profile("meluxina").login.port == 8822
    assert profile("alps-clariden").login.proxy_jump == "ela.cscs.ch"
    assert not profile("frontier").login.multiplex
    assert profile("marenostrum5").login.interval == 20
    assert [name for name in FACILITIES if not profile(name).transfer.shell] == ["leonardo"]


@pytest.mark.parametrize("name", FACILITIES)
def test_the_table_of_facilities_says_what_the_profile_says(name: str) -> None:
    login, scheduler, transfer = facilities_page.facilities()[name][1:4]
    site = profile(name)
    assert login.split(",")[0].split(" ")[0] == site.login.kind
    assert (f"port {site.login.port}" in login) == (site.login.port != 22)
    assert (f"through `{site.login.proxy_jump}`" in login) == bool(site.login.proxy_jump)
    assert scheduler == {"slurm": "Slurm", "pbs": "PBS Pro"}[site.scheduler.kind]
    assert transfer == (
        f"`{site.transfer.host}`{'' if site.transfer.shell else ', no shell'}" if site.transfer.host else "login host"
    )


def test_the_table_of_facilities_has_a_row_for_each() -> None:
    assert sorted(facilities_page.facilities()) == sorted(FACILITIES)


def test_the_logins_of_every_kind_of_site_are_counted_by_a_test() -> None:
    """The tests named on the page take the numbers from its table; a row that none of them asks for is a claim."""
    page = facilities_page.PAGE.read_text(encoding="utf-8").split("## Logins of two rounds")[1]
    counting = "".join((ROOT / path).read_text(encoding="utf-8") for path in re.findall(r"`(tests/\w+\.py)`", page))
    assert [kind for kind in facilities_page.logins() if f'LOGINS["{kind}"]' not in counting] == []


def test_the_table_of_facilities_names_no_test_that_is_not_there() -> None:
    text = (ROOT / "docs" / "facilities.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/\w+\.py)`", text))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
