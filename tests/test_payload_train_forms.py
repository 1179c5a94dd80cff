"""The reference trainer's forms of data, adapters, and local objectives."""

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
import transformers

from flctl.campaign.corpora import write_corpus
from flctl.model.tiny import write_tiny_model
from tests.test_payload_train import TRAINER, split_of
from tests.test_payload_train_ranks import EXACT, MPIEXEC, Site, apart, losses

RECORDS = [
    {"instruction": f"Quanto fa {a} più {b}?", "input": "" if a % 2 else "Rispondi in cifre.", "output": str(a + b)}
    for a in range(12)
    for b in range(8)
]


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", TRAINER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms") / "model"
    write_tiny_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_corpus("italian", folder, seed=1)
    return folder


# Data


def test_records_give_the_same_tokens_from_jsonl_parquet_and_a_folder_of_datasets(trainer, model, data, tmp_path):
    records = [{"text": path.read_text()} for path in sorted(data.iterdir())]
    table = pyarrow.Table.from_pylist(records)
    for name in ("jsonl", "parquet", "saved", "parts"):
        (tmp_path / name).mkdir()
    (tmp_path / "jsonl/a.jsonl").write_text("\n".join(map(json.dumps, records)))
    pyarrow.parquet.write_table(table, tmp_path / "parquet/a.parquet", row_group_size=5)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved/a")
    datasets.DatasetDict(train=datasets.Dataset(table)).save_to_disk(tmp_path / "parts/a")
    made = [
        split_of(trainer, tmp_path / name, model, tmp_path / name) for name in ("jsonl", "parquet", "saved", "parts")
    ]
    assert all(each == made[0] for each in made)
    assert len(made[0].rows) > 100


def test_unreadable_records_are_refused_without_quoting_them(trainer, model, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"segreto")
    options = trainer.read_options({})
    with pytest.raises(trainer.Refused, match="unreadable data") as refused:
        list(trainer.read_documents(tmp_path / "a.parquet", options))
    assert (refused.value.kind, "segreto" in str(refused.value)) == ("data", False)
    pyarrow.parquet.write_table(pyarrow.table({"testo": ["segreto"]}), tmp_path / "b.parquet")
    with pytest.raises(trainer.Refused, match="record 1 has no text in 'text'"):
        list(trainer.read_documents(tmp_path / "b.parquet", options))
    parts = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["segreto"]})})
    parts.save_to_disk(tmp_path / "c")
    with pytest.raises(trainer.Refused, match="none is called `train`"):
        list(trainer.read_documents(tmp_path / "c", options))
    (tmp_path / "d").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "d" / name).write_text("{}")
    (tmp_path / "e.jsonl").write_text("[" * 200_000)
    for name in ("d", "e.jsonl"):
        with pytest.raises(trainer.Refused, match=r"unreadable data: .* cannot be read"):
            list(trainer.read_documents(tmp_path / name, options))


def test_instructions_longer_than_a_sequence_are_left_out_which_is_said(trainer, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    monkeypatch.setenv("FLCTL_DATA", str(tmp_path / "a.jsonl"))
    options = trainer.read_options({"format": "alpaca", "sequence_length": 16})
    with pytest.raises(trainer.Refused, match=r"within 16 tokens; raise train\.sequence_length"):
        trainer.read_data(str(model), options, trainer.World())
    long = RECORDS[0] | {"instruction": "lungo " * 1000, "output": "mai"}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*RECORDS, long])))
    trainer.read_data(str(model), options | {"sequence_length": 400, "validation": 0.0}, trainer.World())
    assert "1 records are left out" in capsys.readouterr().out


def test_instructions_have_the_prompts_of_alpaca_and_the_loss_on_the_answer_only(trainer, model, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    options = trainer.read_options({"format": "alpaca", "sequence_length": 400, "validation": 0.2})
    tokenizer = trainer.load_tokenizer(str(model))
    trainer.build_store(tmp_path / "store", "d", trainer.find_files(tmp_path / "data"), tokenizer, options)
    store = trainer.Store.open(tmp_path / "store")
    assert len(store.training) + len(store.validation) == len(RECORDS)
    ids, labels = store.rows(store.training, list(range(len(store.training))))
    seen = set()
    for row, wanted in zip(ids, labels, strict=True):
        answer = tokenizer.decode(wanted[wanted != -100])
        text = tokenizer.decode(row)
        assert answer.endswith("<|end|>")
        assert f"### Response:{answer}".startswith("### Response:")
        number = int(answer.removesuffix("<|end|>"))
        record = next(r for r in RECORDS if r["instruction"] in text and int(r["output"]) == number)
        assert ("### Input:" in text) == bool(record["input"])
        seen.add(record["instruction"])
    assert len(seen) == len(store.training)
    assert store.counted(store.training, [0]) == int((labels[0] != -100).sum())


def test_an_instruction_campaign_trains_the_same_in_one_and_two_processes(model, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    train = {"format": "alpaca", "sequence_length": 400}
    one = Site(tmp_path / "one", tmp_path / "a.jsonl").run(model, (), train, steps=4)
    assert one.status == 0, one.error
    assert losses(one)[-1] < losses(one)[0]
    two = Site(tmp_path / "two", tmp_path / "a.jsonl").run(model, (*MPIEXEC, "2"), train | {"micro_batch": 1}, steps=4)
    assert two.status == 0, two.error
    assert two.metrics["train_loss"] == pytest.approx(one.metrics["train_loss"], rel=EXACT)
    assert two.metrics["tokens"] == one.metrics["tokens"] < 4 * 8 * 400


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model, data, tmp_path):
    config = transformers.AutoConfig.from_pretrained(model)
    config.vocab_size, config.pad_token_id = 40, None
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    for path in model.glob("*token*"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    ended = Site(tmp_path / "site", data).run(tmp_path / "base")
    assert ended.status == 1
    assert "train.py: error [tokenizer]: the tokenizer gives token" in ended.error
    assert "but the model knows 40 tokens" in ended.error


# Adapters


def write_adapter(base: Path, folder: Path, **more: Any) -> None:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
    peft.get_peft_model(model, settings).save_pretrained(folder)


def test_an_adapter_is_trained_alone_and_the_same_by_one_and_two_processes(model, data, tmp_path):
    write_adapter(model, tmp_path / "adapter")
    runs = {}
    for name, launch in (("one", ()), ("two", (*MPIEXEC, "2"))):
        site = Site(tmp_path / name, data)
        runs[name] = site.run(tmp_path / "adapter", launch, {"lr": 0.05}, frozen=model, steps=4)
        assert runs[name].status == 0, runs[name].error
    one, two = runs["one"], runs["two"]
    for ended in runs.values():
        names = sorted(path.name for path in ended.out.iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors", "metrics.json"]
    assert losses(one)[-1] < losses(one)[0]
    assert two.metrics["train_loss"] == pytest.approx(one.metrics["train_loss"], rel=EXACT)
    assert apart(one.out, two.out) < 1e-4
    opened = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), two.out)
    changed = [name for name, weight in opened.named_parameters() if "lora_B" in name and float(weight.abs().max())]
    assert len(changed) == sum("lora_B" in name for name, _ in opened.named_parameters())


def test_an_adapter_with_a_module_of_its_own_is_trained_too(data, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_model(base, seed=1, tied=False)
    write_adapter(base, adapter, modules_to_save=["lm_head"])
    runs = []
    for name, launch in (("one", ()), ("two", (*MPIEXEC, "2"))):
        runs.append(Site(tmp_path / name, data).run(adapter, launch, {"lr": 0.05}, frozen=base, steps=3))
        assert runs[-1].status == 0, runs[-1].error
    assert runs[0].metrics["train_loss"] == pytest.approx(runs[1].metrics["train_loss"], rel=EXACT)
    assert apart(runs[0].out, runs[1].out) < 1e-4
    assert apart(runs[0].out, adapter) > 1e-2


def test_a_run_of_an_adapter_goes_on_from_its_checkpoint(model, data, tmp_path):
    write_adapter(model, tmp_path / "adapter")
    train = {"lr": 0.05, "checkpoint_minutes": 1e-9}
    whole = Site(tmp_path / "whole", data).run(tmp_path / "adapter", (), train, frozen=model, steps=6)
    site = Site(tmp_path / "site", data)
    first = site.run(tmp_path / "adapter", (), train, frozen=model, steps=6)
    assert first.status == 0
    assert (site.root / "checkpoint/progress").read_text() == "5"
    again = site.run(tmp_path / "adapter", (), train, frozen=model, steps=6, attempt=2)
    assert (again.status, len(again.lines)) == (0, 1), again.error
    assert apart(again.out, whole.out) < 1e-5


def test_four_bits_without_a_gpu_are_refused(model, data, tmp_path):
    write_adapter(model, tmp_path / "adapter")
    ended = Site(tmp_path / "site", data).run(tmp_path / "adapter", (), {"quantize": "4bit"}, frozen=model)
    assert ended.status == 1
    assert 'train.py: error [options]: train.quantize = "4bit" needs a GPU' in ended.error


# What is held at a time


def test_gradients_are_sharded_after_each_pass(trainer, model, data, tmp_path, monkeypatch):
    """Between the passes of a step no process holds the gradient of the whole model."""
    options = trainer.read_options({"batch": 4, "micro_batch": 2, "sequence_length": 32})
    monkeypatch.setenv("FLCTL_DATA", str(data))
    world = trainer.World()
    store = trainer.read_data(str(model), options, world)
    with process_group():
        loaded = trainer.Loaded(trainer.load_shards(str(model), "", options, world)[0], {}, whole=False)
        loaded.run = loaded.model
        ask = trainer.Ask(steps=1, behind=0, total=1, version=0, deadline=math.inf, spare=0.0, seed=1)
        training = trainer.Training(loaded, store, options, ask, world)
        training._backward([0, 1], 128, 4, last=False)
        assert all(hasattr(weight.grad, "placements") for weight in training.weights)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["LlamaConfig", "GPTNeoXConfig", "GPT2Config", "GemmaConfig"])
def test_a_sharded_model_computes_and_is_written_as_transformers_does(kind, trainer, tmp_path):
    """Buffers that no file holds (rotary's), tied weights, and a name that transformers changes when it loads."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8} if kind == "GemmaConfig" else {}
    config = getattr(transformers, kind)(**sizes, bos_token_id=1, eos_token_id=2, max_position_embeddings=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(24)[None]
    world = trainer.World()
    with process_group(), torch.no_grad():
        model, names = trainer.load_shards(str(tmp_path / "base"), "", trainer.read_options({}), world)
        stored = trainer.stored_dtypes(tmp_path / "base")
        expected = base(input_ids=ids).logits
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
        (tmp_path / "out").mkdir()
        trainer.save(trainer.Loaded(model, stored, False, names=names), tmp_path / "out", world)
    assert trainer.stored_dtypes(tmp_path / "out") == stored
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)


def test_an_evaluation_holds_one_model_at_a_time(trainer, model, data, tmp_path, monkeypatch):
    import weakref

    loads, held = trainer.load, []

    def load(*words: Any) -> Any:
        assert [each for each in held if each() is not None] == []
        loaded = loads(*words)
        held.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(trainer, "load", load)
    monkeypatch.setenv("FLCTL_DATA", str(data))
    monkeypatch.setenv("FLCTL_SUBJECTS", f"{model}\n{model}")
    options = trainer.read_options({"batch": 4, "sequence_length": 32, "validation_batches": 1})
    order = {"subjects": [{"name": "a"}, {"name": "b"}]}
    found = trainer.evaluate_subjects(order, options, trainer.World())["evaluation"]
    assert found["a"] == found["b"]
    assert len(held) == 2


# Local objectives


@pytest.fixture
def make(trainer: ModuleType, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Training of the tiny model in this process."""

    def made(**options: Any) -> Any:
        monkeypatch.setenv("FLCTL_DATA", str(data))
        monkeypatch.setenv("FLCTL_STATE", str(tmp_path / "state"))
        monkeypatch.setenv("FLCTL_OUT", str(tmp_path / "out"))
        given = trainer.read_options(
            {"batch": 4, "sequence_length": 32, "clip": 0.0, "optimizer": "sgd", "weight_decay": 0.0, "lr": 0.1}
            | {"schedule": "constant"}
            | options
        )
        world = trainer.World()
        store, loaded = trainer.read_data(str(model), given, world), trainer.load(str(model), given, world)
        ask = trainer.Ask(steps=10, behind=0, total=10, version=0, deadline=math.inf, spare=0.0, seed=1)
        return trainer.Training(loaded, store, given, ask, world)

    return made


def values(training: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in training.weights]


def test_fedprox_pulls_towards_the_base(make):
    """After one equal step, the second's gradient has mu (w - w0) more: plain SGD makes the difference visible."""
    plain, pulled = make(), make(mu=0.5)
    begun = values(plain)
    plain.step()
    pulled.step()
    after = values(plain)
    assert all(torch.equal(one, other) for one, other in zip(after, values(pulled), strict=True))
    plain.step()
    pulled.step()
    for w0, w1, free, held in zip(begun, after, values(plain), values(pulled), strict=True):
        assert torch.allclose(free - held, 0.1 * 0.5 * (w1 - w0), atol=1e-6)


def test_scaffold_steps_against_its_drift_and_keeps_what_the_paper_says(make, trainer):
    """Steps g - c_k + c; c_k+ = c_k - c + (w - w_k) / (K lr), Karimireddy et al. 2020, option II."""
    plain, corrected = make(), make(scaffold=True)
    begun = values(plain)
    torch.manual_seed(1)
    corrected.ours = [torch.randn_like(weight) / 100 for weight in corrected.weights]
    corrected.all = [torch.randn_like(weight) / 100 for weight in corrected.weights]
    before = [ours.clone() for ours in corrected.ours]
    plain.step()
    corrected.step()
    groups = zip(values(plain), values(corrected), corrected.all, corrected.ours, strict=True)
    assert all(torch.allclose(free - held, 0.1 * (c - c_k), atol=1e-6) for free, held, c, c_k in groups)
    corrected.controls()
    groups = zip(begun, values(corrected), before, corrected.all, corrected.ours, strict=True)
    for w, w_k, c_k, c, kept in groups:
        assert torch.allclose(kept, c_k - c + (w - w_k) / 0.1, atol=1e-5)


def test_scaffolds_controls_of_two_sites_give_the_common_one_from_the_models_alone(make, trainer):
    """c = [.2, .15, 0] of c_a = [-.2, -.3, .4], c_b = [.6, .6, -.4] with K lr = 1: what two sites compute from the two
    models, without having seen each other's."""
    w, w_a, w_b = (torch.tensor(v) for v in ([1.0, -2.0, 0.5], [1.2, -1.7, 0.1], [0.4, -2.6, 0.9]))
    site = object.__new__(trainer.Training)
    site.base, site.ours, site.all, site.done = [w], [torch.zeros(3)], [torch.zeros(3)], trainer.Done(rates=1.0)
    for weights, expected in ((w_a, [-0.2, -0.3, 0.4]), (w_b, [0.6, 0.6, -0.4])):
        site.weights, site.ours = [weights], [torch.zeros(3)]
        site.controls()
        assert torch.allclose(site.ours[0], torch.tensor(expected), atol=1e-6)
    assert torch.allclose(w - (w_a + w_b) / 2, torch.tensor([0.2, 0.15, 0.0]), atol=1e-6)


def test_scaffold_goes_on_with_its_controls_in_the_next_round(model, data, tmp_path):
    train = {"scaffold": True, "optimizer": "sgd", "lr": 0.1, "schedule": "constant"}
    site = Site(tmp_path, data)
    first = site.run(model, (), train, steps=3)
    assert first.status == 0, first.error
    second = site.run(model, (), train, steps=3, number=2, continues=1, base={"version": 1})
    assert second.status == 0, second.error
    assert "goes on with the state that run 1 left here" in second.log
    missed = site.run(model, (), train, steps=3, number=3, continues=2, base={"version": 5})
    assert "SCAFFOLD's control variates begin anew" in missed.log


def test_a_weight_that_the_loss_does_not_reach_is_no_hindrance(make, trainer, tmp_path, monkeypatch):
    training = make(optimizer="adamw", mu=0.1)
    unused = torch.nn.Parameter(torch.ones(3))
    training.trained["unused"] = unused
    training.weights.append(unused)
    training.base.append(unused.detach().clone())
    training.step()
    monkeypatch.setenv("FLCTL_CHECKPOINT", str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint").mkdir()
    kept = trainer.Kept({}, trainer.World())
    assert kept.checkpoint(training)
    again = make(optimizer="adamw", mu=0.1)
    trainer.Kept({}, trainer.World()).resume(again)
    assert again.done.steps == 1
    state = again.optimizer.state[again.weights[0]]
    assert torch.equal(state["exp_avg"], training.optimizer.state[training.weights[0]]["exp_avg"])


def test_dp_sgd_clips_each_sequences_gradient_and_accounts_for_what_it_let_out(make, trainer, tmp_path, monkeypatch):
    """With next to no noise: w - lr / batch * sum of g_i / max(1, |g_i| / C), whatever the size of a pass (Abadi et al.
    2016)."""
    places, clip = [0, 5, 9, 11, 17], 0.05
    training = make(dp_noise_multiplier=1e-9, dp_clip=clip, micro_batch=2)
    monkeypatch.setattr(training, "places", lambda: places)
    begun = values(training)
    training.loaded.model.train()
    training.step()
    expected = [torch.zeros_like(weight) for weight in begun]
    reference = make()
    for place in places:
        ids, labels = reference.store.rows(reference.store.training, [place])
        reference.loaded.model.zero_grad()
        logits = reference.loaded.model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        gradient = [weight.grad for weight in reference.weights]
        norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
        assert norm > clip
        for total, part in zip(expected, gradient, strict=True):
            total += part * clip / norm
    for before, after, total in zip(begun, values(training), expected, strict=True):
        assert torch.allclose(after - before, -0.1 / 4 * total, atol=1e-7)


def test_a_step_of_dp_sgd_whose_draw_is_empty_is_noise_alone(make, monkeypatch):
    training = make(dp_noise_multiplier=0.5, dp_clip=1.0)
    training.loaded.model.train()
    for places in ([], [0, 1], []):
        monkeypatch.setattr(training, "places", lambda places=places: places)
        begun = values(training)
        assert math.isfinite(training.step()[0])
        moved = torch.cat([(after - before).flatten() for before, after in zip(begun, values(training), strict=True)])
        # lr / batch * noise of deviation 0.5 * clip; the two sequences add at most lr / batch * 2 clips in all
        assert float(moved.std()) == pytest.approx(0.1 / 4 * 0.5, rel=0.05)
    assert training.done.samples == 2


def test_dp_sgd_reports_the_epsilon_of_all_its_runs(model, data, tmp_path):
    from opacus.accountants import RDPAccountant

    train = {"dp_noise_multiplier": 1.1, "dp_clip": 1.0, "batch": 8}
    site = Site(tmp_path, data)
    told = []
    for number in (1, 2):
        ended = site.run(model, (), train, steps=4, number=number)
        assert ended.status == 0, ended.error
        told.append(ended.metrics["privacy"]["epsilon"])
    rows = int(ended.log.split(" sequences to train on")[0].split()[-1])
    for runs, epsilon in enumerate(told, start=1):
        accountant = RDPAccountant()
        accountant.history = [(1.1, 8 / rows, 4 * runs)]
        assert epsilon == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-6)
    assert told[1] > told[0] > 0
    # The limit lets the next run make as many steps as are left, and the one after it none.
    limit = accountant.get_epsilon(delta=1e-5) * 1.01
    short = site.run(model, (), train | {"dp_epsilon": limit}, steps=400, number=3)
    assert short.status == 0, short.error
    assert 0 < short.metrics["steps"] < 400
    assert told[1] < short.metrics["privacy"]["epsilon"] <= limit
    none = site.run(model, (), train | {"dp_epsilon": limit}, steps=400, number=4)
    assert none.status == 1
    assert "train.py: error [options]: the data's privacy is spent" in none.error


def test_dp_sgd_of_several_processes_is_refused(model, data, tmp_path):
    ended = Site(tmp_path, data).run(model, (*MPIEXEC, "2"), {"dp_noise_multiplier": 1.0, "sharding": "none"})
    assert ended.status != 0
    assert "train.py: error [options]: train.dp_noise_multiplier is for one process" in ended.error
