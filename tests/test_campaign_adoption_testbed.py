"""A lost folder is rebuilt over real SSH from sites with real queues, while their jobs run."""

import shutil

from tests.federation import SITES, Federation
from tests.testbed import Testbed


def test_a_folder_lost_while_jobs_run_is_rebuilt_and_no_job_is_submitted_twice(testbed: Testbed) -> None:
    campaign = Federation(testbed, "lost", karolina={"train": {"seconds": 5}}, leonardo={"train": {"seconds": 5}})
    campaign.json("round")
    campaign.flctl("campaign", "start", "--rounds", "1")

    def both_are_in_the_queue() -> bool:
        campaign.flctl("campaign", "tick", timeout=300)
        return all(campaign.run(site, 2).get("stage", "ordered") not in ("ordered", "delivered") for site in SITES)

    campaign.wait(both_are_in_the_queue, limit=300)
    label = campaign.remote("karolina").name
    remote = {site: campaign.remote(site) for site in SITES}
    folder = testbed.user.folder(testbed.user.home / "kept")
    texts = {site: (campaign.place / "sites" / f"{site}.toml").read_text() for site in SITES}
    profiles = [str(testbed.user.file(folder / f"{site}.toml", text)) for site, text in texts.items()]
    shutil.rmtree(campaign.place)
    rebuilt = testbed.flctl(
        "adopt", str(campaign.place), "--sites", ",".join(profiles), "--id", label, cwd=folder, timeout=300
    )
    assert rebuilt.returncode == 0, rebuilt.stdout + rebuilt.stderr
    assert "model 0001" in rebuilt.stdout
    answer = campaign.json("round", "--wait", "10m")
    assert answer["data"]["model"]["version"] == 2
    for site in SITES:
        logs = (remote[site] / "runs").glob("*/log")
        assert sum(log.read_text().count("trainer: begins") for log in logs) == 2
        assert campaign.run(site, 2)["attempt"] == 1
        assert campaign.run(site, 3) == {}
