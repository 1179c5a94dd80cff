"""Rounds at sites whose connections go dead without a word."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.chaos.proxy import Plan, Proxy
from tests.ssh_campaigns import SshCampaign
from tests.testbed.sshd import Sshd

PROGRAM = """
import sys
from flctl.campaign import contacts
from flctl.cli.main import main
from flctl.facility import patience
{}
sys.exit(main())
"""
IMPATIENT = """
patience.CONNECT, patience.ALIVE_INTERVAL, patience.ALIVE_COUNT = 3, 1, 3
contacts.BACKOFF_FIRST = contacts.BACKOFF_MOST = 1.0
"""


class Timed(SshCampaign):
    """A campaign whose programs have another patience than flctl's own."""

    def __init__(self, *arguments: Any, times: str, **login: Any) -> None:
        self.times = times
        super().__init__(*arguments, **login)

    def words(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", PROGRAM.format(self.times), *arguments]


def test_a_round_completes_whatever_stage_of_it_falls_silent(tmp_path: Path) -> None:
    """Every connection there is goes dead, twice in a round; the next ones, a moment later, are sound again."""
    with (
        Sshd(name="bh-round", address="127.0.93.8", port=24308, user="flctl-bh") as server,
        Proxy(server.address, server.port) as road,
    ):
        campaign = Timed(tmp_path, server, times="", host=road.address, port=road.port)
        try:
            assert campaign.flctl("round").returncode == 0
            first = road.up + road.down
            assert campaign.flctl("round").returncode == 0
            whole = road.up + road.down - first  # the first round brings more there
            campaign.times = IMPATIENT
            places = [road.up + road.down + int(part * whole) for part in (0.1, 0.8)]
            struck = threading.Thread(target=strike_at, args=(road, places), daemon=True)
            struck.start()
            ran = campaign.flctl("round", timeout=300)
            struck.join(timeout=60)
            assert ran.returncode == 0, ran.stdout + ran.stderr
            assert (campaign.place / "models" / "0003" / "flctl.json").exists()
            troubles = [entry for entry in campaign.journal() if entry["event"] == "trouble"]
            assert {entry["code"] for entry in troubles} == {"site_unreachable"}, troubles
            assert len(troubles) >= 2
            assert campaign.submissions(server.name) == 3
        finally:
            campaign.clear()


def test_a_site_that_has_fallen_silent_delays_no_other(tmp_path: Path) -> None:
    """While a login's answer is awaited, the other site's run goes from its order to its end."""
    with (
        Sshd(name="bh-sound", address="127.0.93.8", port=24308, user="flctl-bh") as sound,
        Sshd(name="bh-mute", address="127.0.93.8", port=24310, user="flctl-bhjump") as mute,
        Proxy(mute.address, mute.port, Plan(after=1600, then="freeze")) as road,
    ):
        campaign = Timed(tmp_path, sound, mute, times="patience.AUTH = 600.0")
        campaign.profile(mute.name, host=road.address, port=road.port)
        program = campaign.popen("round")
        try:
            campaign.wait(lambda: campaign.run(sound.name).get("stage") == "fetched", 120, "the sound site's run")
            assert road.failed_at is not None
            told = [entry["event"] for entry in campaign.journal() if entry.get("site") == mute.name]
            assert told == ["order"], told
        finally:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
            campaign.clear()


def strike_at(road: Proxy, places: list[int]) -> None:
    """Silence once so many bytes have passed, for the connections of that moment and the next half second."""
    for moved in places:
        while road.up + road.down < moved:
            time.sleep(0.002)
        road.strike("freeze")
        time.sleep(0.5)
        road.strike("pass")
