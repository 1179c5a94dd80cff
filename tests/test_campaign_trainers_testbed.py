"""A trainer of the campaign's own folder, through real sshd and real Slurm."""

from pathlib import Path

from safetensors.numpy import load_file

from tests.campaigns import TRAINER, reference
from tests.federation import SITES, Federation
from tests.testbed import Testbed


def test_the_campaigns_own_trainer_goes_to_both_facilities_and_trains_there(testbed: Testbed) -> None:
    federation = Federation(testbed, "own-trainer", real=True)
    testbed.user.file(testbed.user.folder(federation.place / "trainer") / "small.py", TRAINER.read_text())
    federation.set("steps = 4", 'steps = 4\ncommand = "trainer/small.py"')
    federation.set("sequence_length = 1024", "scale = 0.5")  # an option that train.py does not know
    assert federation.json("round")["status"] == "ok"
    merged = load_file(federation.place / "models" / "0001" / "model.safetensors")
    expected = reference(federation.place, 1)
    assert all((merged[name] == expected[name]).all() for name in expected) and merged.keys() == expected.keys()
    for site in SITES:
        (there,) = (federation.remote(site) / "payload").glob("*/small.py")
        script = (federation.remote(site) / "runs" / "0001-1" / "job.sh").read_text()
        assert f" {there}\n" in script and there.read_bytes() == Path(TRAINER).read_bytes()
        assert federation.jobs_started(site) == 1
