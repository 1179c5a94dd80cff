"""What goes wrong at a site, at home or in people's hands, and how a campaign goes on; on local sites, for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flctl.campaign.workspace import lock
from tests.campaigns import Campaign


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


@pytest.fixture
def single(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path, sites=("pisa",))


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_claim_cut_off_before_it_wrote_its_time_is_given_up_in_the_end(single: Campaign) -> None:
    """The shell dies between mkdir and date: nothing was submitted, nothing ever will be under this attempt."""
    fake = single.root / "bin"
    program(fake, "date", "#!/bin/sh\nkill -9 $PPID\n")
    cut = single.flctl("round", "--wait", "2s", PATH=f"{fake}:{os.environ['PATH']}")
    assert cut.returncode in (5, 11), cut.stderr
    assert (single.remote("pisa") / "runs" / "0001-1" / "claim").is_dir()
    assert single.json("round")["data"]["done"]
    (given_up,) = [entry for entry in single.journal() if entry.get("stage") == "failed"]
    assert (given_up["cause"], "never accepted" in given_up["reason"]) == ("lost", True)
    assert single.attempts("pisa") == ["0001-1", "0001-2"]
    assert single.submissions("pisa") == 1


def test_a_site_that_was_purged_gets_everything_again(campaign: Campaign) -> None:
    campaign.json("round")
    shutil.rmtree(campaign.remote("pisa"))
    (campaign.remote("brno") / "models" / "0000" / "config.json").unlink()
    assert campaign.json("round")["data"]["model"]["version"] == 2


def test_data_that_was_purged_is_noticed_before_a_job_waits_for_it(campaign: Campaign) -> None:
    data = campaign.root / "pisa" / "data"
    data.rename(data.with_name("away"))
    (error,) = [error for error in campaign.json("round", code=3)["errors"] if error["site"] == "pisa"]
    assert f"there is no {data} (purged?)" in error["message"]
    assert (campaign.submissions("brno"), campaign.submissions("pisa")) == (1, 0)
    data.with_name("away").rename(data)
    assert campaign.json("round")["data"]["model"]["version"] == 1
    assert (campaign.submissions("brno"), campaign.submissions("pisa")) == (1, 1)


def test_a_retry_replaces_a_model_that_was_spoilt_at_the_site(single: Campaign) -> None:
    single.profile("pisa", behave="fail")
    told = single.flctl("round")
    assert told.returncode == 6
    assert "skip" not in told.stdout + told.stderr, "it would leave nothing to merge"
    assert "flctl cancel" in single.flctl("status").stdout
    weights = single.remote("pisa") / "models" / "0000" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    single.profile("pisa")
    single.flctl("retry")
    assert single.json("round")["data"]["model"]["version"] == 1


def test_a_corrected_path_of_a_profile_is_used(single: Campaign) -> None:
    profile = single.place / "sites" / "pisa.toml"
    good = profile.read_text()
    profile.write_text(good.replace(f"{single.root}/pisa/data", f"{single.root}/nowhere"))
    answer = single.json("site", "test", code=3)
    assert "storage.data" in answer["errors"][0]["hint"]
    profile.write_text(good)
    assert single.json("site", "test", code=None)["errors"] == []


def test_a_round_whose_plan_somebody_cancels_does_not_say_done(single: Campaign) -> None:
    single.profile("pisa", behave="hang")
    process = single.popen("round", "--rounds", "3")
    single.wait(lambda: single.run("pisa").get("stage") == "running")
    assert single.flctl("cancel").returncode == 0
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "cancelled" in text


def test_a_reader_that_goes_away_does_not_end_a_round(single: Campaign) -> None:
    words = " ".join(single.words("round"))
    subprocess.run(["/bin/sh", "-c", f"{words} | true"], cwd=single.place, timeout=120)
    assert single.json("status")["data"]["model"]["version"] == 1
    stages = [entry["stage"] for entry in single.journal() if entry["event"] == "run"]
    assert stages[-2:] == ["ended", "fetched"]
    assert "queued" in stages


def trainer_with(single: Campaign, line: str) -> Path:
    """The small trainer, with one line more before it writes its metrics."""
    text = (Path(__file__).parent / "data" / "trainer.py").read_text()
    mark = '(out / "metrics.json").write_text(json.dumps(metrics))'
    assert mark in text
    return program(single.root / "own", "trainer.py", text.replace(mark, f"{line}\n{mark}"))


def test_no_text_of_a_site_comes_back_in_metrics_or_reasons(single: Campaign) -> None:
    canary = "Nel-mezzo del cammin"
    single.profile("pisa", trainer=trainer_with(single, f"metrics['worst'] = {{'example': {canary!r}, 'loss': 3.5}}"))
    single.json("round")
    assert single.run("pisa")["contribution"]["metrics"]["worst"] == {"loss": 3.5}
    single.profile("pisa", trainer=trainer_with(single, f"raise ValueError('bad error in {canary}')"))
    answer = single.json("round", code=6)
    assert "exited with status 1" in answer["errors"][0]["message"]
    assert canary in single.flctl("log", "pisa").stdout, "who asks for the log sees it"
    for path in single.place.rglob("*"):
        assert not path.is_file() or canary.encode() not in path.read_bytes(), path


def test_metrics_too_large_are_the_reason_told(single: Campaign) -> None:
    line = "metrics['each'] = {str(n): n * 1.5 for n in range(50000)}"
    single.profile("pisa", trainer=trainer_with(single, line))
    assert "metrics.json holds more than" in single.json("round", code=6)["errors"][0]["message"]


def test_more_bytes_than_allowed_are_not_fetched(single: Campaign) -> None:
    single.set("size_factor = 1.5", "size_factor = 0.1")
    answer = single.json("round", code=9)
    assert "size_factor" in answer["errors"][0]["message"]
    assert not any(
        "safetensors" in e["path"] for e in single.journal() if e["event"] == "file" and e["direction"] == "in"
    )
    single.set("size_factor = 0.1", "size_factor = 1.5")
    assert single.json("round")["data"]["done"]
    assert single.submissions("pisa") == 1, "what was trained is fetched once it may be"


def test_an_interrupted_command_answers_with_json_too(single: Campaign) -> None:
    single.profile("pisa", seconds=20)
    process = subprocess.Popen(
        single.words("round", "--json"), cwd=single.place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    single.wait(lambda: single.run("pisa").get("stage") == "running")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=15)
    answer = json.loads(out)
    assert (process.returncode, answer["exit_code"], answer["errors"][0]["code"]) == (130, 130, "interrupted")
    single.flctl("cancel")


def test_a_second_signal_leaves_at_once(single: Campaign) -> None:
    slow = program(single.root / "bin", "slow", f'#!/bin/sh\nsleep 30\nexec {sys.executable} "$@"\n')
    path = single.place / "sites" / "pisa.toml"
    path.write_text(path.read_text().replace(f'seal_python = "{sys.executable}"', f'seal_python = "{slow}"'))
    process = single.popen("round")
    single.wait(lambda: list((single.root / "pisa" / "work").glob("*/runs/0001-1/claim")), what="the submission")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "a running remote command may end"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - began < 3


def test_an_ignored_hangup_stays_ignored(single: Campaign) -> None:
    single.profile("pisa", seconds=3)
    process = subprocess.Popen(["nohup", *single.words("round")], cwd=single.place, stdout=subprocess.DEVNULL)
    single.wait(lambda: single.run("pisa").get("stage") == "running")
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0


def test_ctrl_c_is_heard_while_another_flctl_decides(single: Campaign) -> None:
    single.flctl("campaign", "start", "--rounds", "1")
    with lock(single.place / "lock", "test", 1):
        process = subprocess.Popen(
            [sys.executable, "-c", OPEN_ROUND], cwd=single.place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


OPEN_ROUND = """
from pathlib import Path
from flctl.campaign.workspace import Workspace
from flctl.cli.round import run_round
workspace = Workspace(Path.cwd())
run_round(workspace, workspace.plan(), None)
"""


def test_wait_holds_also_while_a_step_takes_long(single: Campaign) -> None:
    slow = program(single.root / "bin", "slow", f'#!/bin/sh\nsleep 60\nexec {sys.executable} "$@"\n')
    path = single.place / "sites" / "pisa.toml"
    path.write_text(path.read_text().replace(f'seal_python = "{sys.executable}"', f'seal_python = "{slow}"'))
    began = time.monotonic()
    single.json("round", "--wait", "2s", code=11)
    assert time.monotonic() - began < 20, "2 s, and at most 10 more for the command that runs"


def test_cancelling_all_ends_the_plan_even_where_a_site_cannot_be_told(campaign: Campaign) -> None:
    for site in campaign.sites:
        campaign.profile(site, behave="hang")
    campaign.flctl("campaign", "start", "--rounds", "5")
    campaign.flctl("campaign", "tick")
    path = campaign.place / "sites" / "brno.toml"
    path.write_text(path.read_text().replace(f'seal_python = "{sys.executable}"', 'seal_python = "/nonexistent"'))
    cancelled = campaign.flctl("cancel")
    assert cancelled.returncode == 6
    assert "may still run" in cancelled.stderr
    assert campaign.run("pisa")["stage"] == campaign.run("brno")["stage"] == "failed"
    for site in campaign.sites:
        campaign.profile(site)
    assert campaign.json("round", "--rounds", "1")["data"]["model"]["version"] == 1
    for card in (campaign.remote("brno") / "runs").glob("*/job.card"):
        if json.loads(card.read_text())["state"] == "RUNNING":
            os.killpg(json.loads(card.read_text())["group"], signal.SIGKILL)


def test_a_new_payload_is_brought_before_a_job_is_cancelled(single: Campaign) -> None:
    """flctl was upgraded while a job ran: what cancels it there is not there yet."""
    single.profile("pisa", behave="hang")
    single.flctl("campaign", "start", "--rounds", "1")
    single.flctl("campaign", "tick")
    (payload,) = (single.remote("pisa") / "payload").iterdir()
    payload.rename(payload.with_name("older"))
    assert single.flctl("cancel", "pisa").returncode == 0
    card = single.remote("pisa") / "runs" / "0001-1" / "job.card"
    single.wait(lambda: json.loads(card.read_text())["state"] == "CANCELLED")


def test_a_contribution_spoilt_after_its_fetch_fails_its_run_and_can_be_made_again(campaign: Campaign) -> None:
    campaign.profile("pisa", seconds=4)
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("brno").get("stage") == "fetched")
    weights = campaign.place / "runs" / "brno" / "0001" / "1" / "out" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 8, text
    assert campaign.run("brno")["stage"] == "failed"
    assert not list((campaign.place / "models").glob(".*"))
    campaign.flctl("retry", "brno")
    assert campaign.json("round")["data"]["model"]["version"] == 1


def test_a_damaged_history_stops_nobody(single: Campaign) -> None:
    with (single.place / "journal.jsonl").open("a") as file:
        file.write('{"seq": 12, "pr\n')
    assert single.json("round")["data"]["done"]
    assert single.journal_numbers()[-1] > 5


def test_that_a_site_failed_is_remembered_by_the_next_process(campaign: Campaign) -> None:
    campaign.set("min_sites = 0", "min_sites = 1")
    campaign.profile("pisa", behave="fail")
    campaign.profile("brno", seconds=3)
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "failed")
    process.kill()
    process.communicate()
    answer = campaign.json("round")
    assert (answer["status"], [error["site"] for error in answer["errors"]]) == ("partial", ["pisa"])


def test_the_last_site_of_a_model_cannot_be_skipped(campaign: Campaign) -> None:
    campaign.flctl("campaign", "start", "--rounds", "1")
    assert campaign.flctl("skip", "brno").returncode == 0
    refused = campaign.flctl("skip", "pisa")
    assert refused.returncode == 2
    assert "flctl cancel" in refused.stderr
    assert campaign.json("round")["data"]["model"]["version"] == 1


def test_a_tick_tells_each_time_that_a_round_waits_for_a_person(campaign: Campaign) -> None:
    campaign.profile("pisa", behave="fail")
    campaign.json("round", code=6)
    for _ in range(2):
        answer = campaign.json("campaign", "tick")
        assert (answer["exit_code"], answer["status"]) == (0, "partial")
        assert "flctl retry pisa" in answer["errors"][0]["hint"]


def test_a_full_disk_at_home_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    """A real file system of 2 MB, full in the middle of a round."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=True)
    try:
        campaign = Campaign(tmp_path, sites=("pisa",))
        shutil.copytree(campaign.place, small / "camp")
        campaign.place = small / "camp"
        filler = small / "filler"
        descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError):
            while True:
                os.write(descriptor, b"0" * 512)
        os.close(descriptor)
        full = campaign.flctl("round")
        assert full.returncode == 9, full.stderr
        assert "No space left" in full.stderr
        assert "Traceback" not in full.stderr
        filler.unlink()
        assert campaign.json("round")["data"]["model"]["version"] == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_local_job_sees_nothing_of_our_environment_but_what_a_login_has(single: Campaign) -> None:
    single.profile("pisa", trainer=trainer_with(single, "print('seen', sorted(os.environ))"))
    assert single.flctl("round", MY_TOTP_SECRET="canary", AWS_SECRET="canary").returncode == 0
    log = (single.remote("pisa") / "runs" / "0001-1" / "log").read_text()
    assert "'FLCTL_OUT'" in log
    assert "SECRET" not in log


def test_a_misspelt_option_of_the_trainer_is_found_at_home(tmp_path: Path) -> None:
    single = Campaign(tmp_path, sites=("pisa",))
    path = single.place / "sites" / "pisa.toml"
    path.write_text("".join(line for line in path.open() if not line.startswith("command")))
    single.set("steps = 4", "steps = 4\nlearning_rat = 1")
    refused = single.flctl("round")
    assert refused.returncode == 3
    assert "train.learning_rat" in refused.stderr
    assert not (single.place / "plan.json").exists()


def test_a_model_that_was_damaged_at_home_is_not_pushed(single: Campaign) -> None:
    single.json("round")
    weights = single.place / "models" / "0001" / "model.safetensors"
    os.truncate(weights, 1000)
    answer = single.json("round", code=3)
    assert "models/0001" in answer["errors"][0]["message"]
    assert not (single.remote("pisa") / "models" / ".0001.part").exists()


def test_a_login_that_could_not_be_tried_holds_nothing(single: Campaign) -> None:
    """No agent, an expired certificate: nothing was sent, so nothing has to be released once it is put right."""
    path = single.place / "sites" / "pisa.toml"
    good = path.read_text()
    ssh = good.replace('connection = "local"', 'connection = "ssh"\n[login]\nhost = "127.0.0.1"\nport = 1\nuser = "me"')
    path.write_text(ssh)
    for _ in range(2):
        answer = single.json("round", code=4)
        assert "ssh-agent" in answer["errors"][0]["message"]
    path.write_text(good)
    assert single.json("round")["data"]["done"]
