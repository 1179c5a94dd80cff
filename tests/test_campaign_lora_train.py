"""The same campaign of a LoRA adapter with flctl's own train.py at the sites."""

from pathlib import Path

from tests.test_campaign_lora import begun, check_outcome


def test_train_py_trains_the_adapter_and_nothing_else_comes_back(tmp_path: Path) -> None:
    campaign = begun(tmp_path, "", lr=0.02, batch=2, sequence_length=64, warmup_steps=0, schedule="constant", threads=1)
    ran = campaign.flctl("round", "--steps", "10", timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    came = {line["path"].rsplit("/", 1)[1] for line in campaign.journal() if line.get("direction") == "in"}
    assert {name for name in came if name.endswith((".safetensors", ".bin"))} == {"adapter_model.safetensors"}
    check_outcome(campaign, 1)
