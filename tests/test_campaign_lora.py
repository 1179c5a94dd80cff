"""A whole campaign of a LoRA adapter with the real peft: trained at two sites, merged, exported, opened again."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.campaigns import Campaign

TRAINER = Path(__file__).parent / "data" / "lora_trainer.py"
TEXTS = {"brno": "Příliš žluťoučký kůň úpěl ďábelské ódy. ", "pisa": "Nel mezzo del cammin di nostra vita. "}


def begun(root: Path, trainer: Path | str, **train: Any) -> Campaign:
    campaign = Campaign(root, tuple(TEXTS), "float32", "--lora", "r=4,alpha=16,targets=q_proj+v_proj+down_proj")
    for site, text in TEXTS.items():
        (root / site / "data" / "private.txt").write_text(text * 40)
        campaign.profile(site, trainer=trainer, **train)  # type: ignore[arg-type]
    return campaign


def perplexities(model: Any, folder: Path) -> list[float]:
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for text in TEXTS.values():
        tokens = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(model(tokens, labels=tokens).loss.exp().item())
    return found


def check_outcome(campaign: Campaign, version: int) -> None:
    """The adapter that comes out is one that peft opens, knows more than the base, and is the merged model's."""
    root = campaign.root
    for words in (("--out", str(root / "adapter")), ("--merged", "--out", str(root / "merged"))):
        ran = campaign.flctl("export", str(version), *words)
        assert ran.returncode == 0, ran.stderr
    frozen = {path.name: path.read_bytes() for path in (root / "start").iterdir()}
    base = AutoModelForCausalLM.from_pretrained(root / "start").eval()
    before = perplexities(base, root / "start")
    adapted = PeftModel.from_pretrained(base, root / "adapter").eval()
    after = perplexities(adapted, root / "start")
    assert all(new < 0.95 * old for old, new in zip(before, after, strict=True)), (before, after)
    theirs = adapted.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(root / "merged").eval()
    for name, values in ours.state_dict().items():
        assert torch.allclose(values, theirs[name], rtol=1e-6, atol=1e-6), name
    assert {path.name for path in (root / "merged").iterdir()} == frozen.keys()
    assert {path.name: path.read_bytes() for path in (root / "start").iterdir()} == frozen


def test_two_rounds_with_peft_at_the_sites_make_an_adapter_that_peft_opens(tmp_path: Path) -> None:
    campaign = begun(tmp_path, TRAINER)
    ran = campaign.flctl("round", "--rounds", "2", "--steps", "10", timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first = [campaign.run(site, 1)["contribution"]["metrics"]["evaluation"] for site in TEXTS]
    assert all(scores["trained"]["loss"] < scores["base"]["loss"] for scores in first)
    start = json.loads((campaign.place / "models" / "0000" / "adapter_config.json").read_text())
    assert json.loads((campaign.place / "models" / "0002" / "adapter_config.json").read_text()) == start
    check_outcome(campaign, 2)
