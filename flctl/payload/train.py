#!/usr/bin/env python3
"""flctl's reference trainer: causal-LM training of a Hugging Face folder on the site's private text, one process.

It takes no arguments; the job's environment says everything (FLCTL_MODEL, FLCTL_OUT, FLCTL_DATA, FLCTL_ORDER,
FLCTL_STEPS, FLCTL_GLOBAL_STEP, FLCTL_TOTAL_STEPS, FLCTL_SEED, FLCTL_DEADLINE, FLCTL_SUBJECTS). It writes safetensors
weights and metrics.json into FLCTL_OUT and exits 0. It reads top to bottom; any program that does the same to the
same environment may take its place. Needs torch and transformers 5, holds the text in memory, and starts every run
with a fresh optimizer: what one run teaches the next is the model and the place in the learning-rate schedule."""

import contextlib
import difflib
import gc
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()

# Before the imports below, which take seconds: a signal that comes early must end in a message too.
stopped_by: list[tuple[str, float]] = []  # (signal's name, when) of each SIGUSR1 and SIGTERM


def stop(number: int, frame: object) -> None:
    stopped_by.append((signal.Signals(number).name, time.time()))


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, stop)
    # The site may have no way out, and a trainer has no business there: everything it needs was delivered.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
    gc.disable()  # 0.4 s of 2.3 s: the imports make a million objects and no garbage

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

gc.enable()

Options = dict[str, Any]
# name: (default, (lowest, highest) or the words allowed, what it does)
OPTIONS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "steps": (100, (1, math.inf), "optimizer steps, where FLCTL_STEPS does not say"),
    "lr": (3e-4, (0.0, math.inf), "highest learning rate of AdamW"),
    "batch": (8, (1, math.inf), "sequences per step"),
    "sequence_length": (512, (2, math.inf), "tokens per sequence"),
    "warmup_steps": (0, (0, math.inf), "steps over which the rate rises, counted from the start of the campaign"),
    "schedule": ("cosine", ("cosine", "linear", "constant"), "how the rate falls until FLCTL_TOTAL_STEPS"),
    "min_lr_ratio": (0.1, (0.0, 1.0), "the rate at the end, as a part of lr"),
    "weight_decay": (0.01, (0.0, math.inf), "AdamW's, for matrices; vectors (norms, biases) have none"),
    "clip": (1.0, (0.0, math.inf), "highest norm of the gradient; 0: any"),
    "validation": (0.1, (0.0, 0.9), "part of the text kept from training"),
    "validation_batches": (32, (0, math.inf), "batches an evaluation looks at; 0: all"),
    "dtype": ("auto", ("auto", "float32", "bfloat16"), "what the model computes in; auto: bfloat16 on a GPU that can"),
    "threads": (0, (0, 4096), "CPU threads; 0: as torch finds"),
    "text_field": ("text", (), "the field of a JSON line that holds the text"),
}
TEXT, LINES = (".txt", ".text", ".md"), (".jsonl",)
PASSAGE = 500  # characters; what the validation split takes or leaves as a whole
POOL = 256  # sequences drawn from at random, so that those of one batch come from different places
GRACE = 5.0  # seconds that a final evaluation may still take after a signal
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def what_stops() -> str:
    return stopped_by[0][0] if stopped_by else "the deadline"


class Refused(Exception):
    """The run cannot give a usable result; the message is the one line the user reads."""


def asked(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise Refused(f"{name} is not set: train.py is started by a job of flctl")
    return value


def number(name: str, default: float, kind: type = int) -> Any:
    value = os.environ.get(name, "")
    try:
        return kind(value) if value else default
    except ValueError:
        raise Refused(f"{name} is {value!r}, not a number") from None


def read_order() -> dict[str, Any]:
    path = asked("FLCTL_ORDER")
    try:
        order: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read the order {path}: {error}") from None
    return order


def read_options(given: dict[str, Any]) -> Options:
    """The options in force: OPTIONS' defaults with [train] over them. An unknown or impossible one is refused."""
    options = {name: entry[0] for name, entry in OPTIONS.items()}
    for name, value in given.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)[0]
            raise Refused(f"unknown option train.{name}; the nearest is train.{near}")
        default, allowed, _ = OPTIONS[name]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise Refused(f"train.{name} is {value!r}, but should be like {default!r}")
        if isinstance(default, str) and allowed and value not in allowed:
            raise Refused(f"train.{name} is {value!r}, but should be one of: {', '.join(allowed)}")
        if not isinstance(default, str) and not allowed[0] <= value <= allowed[1]:
            raise Refused(f"train.{name} is {value!r}, but goes from {allowed[0]} to {allowed[1]}")
        options[name] = value
    return options


def find_files(place: Path) -> list[Path]:
    """The text files at or below `place`, hidden ones left out, in an order that is the same everywhere."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise Refused(f"no data: {place} is neither a folder nor a file")
    found = [
        path
        for path in place.rglob("*")
        if path.suffix.lower() in TEXT + LINES
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
        and path.is_file()
    ]
    if not found:
        raise Refused(f"no data: there is no {', '.join(TEXT + LINES)} file below {place}")
    return sorted(found)


def read_documents(path: Path, field: str) -> list[str]:
    """The documents of a file: the file itself, or each line of a JSONL file. Errors never quote the text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"unreadable data: {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise Refused(f"unreadable data: {path}: {error.strerror}") from None
    if path.suffix.lower() not in LINES:
        return [text]
    documents = []
    for place, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError:
                raise Refused(f"unreadable data: {path}, line {place} is not JSON") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise Refused(f"unreadable data: {path}, line {place} has no text in {field!r} (train.text_field)")
            # JSON may hold half of a surrogate pair, which no tokenizer takes.
            documents.append(record[field].encode("utf-8", "replace").decode())
    return documents


def cut_passages(document: str) -> list[str]:
    """The document as passages of whole lines (a long line is cut), each of PASSAGE characters and up to twice that;
    only a whole document may be shorter."""
    passages, passage = [], ""
    for line in document.splitlines(keepends=True):
        for start in range(0, len(line), PASSAGE):
            passage += line[start : start + PASSAGE]
            if len(passage) >= PASSAGE:
                passages.append(passage)
                passage = ""
    if passages:
        passages[-1] += passage
    elif passage.strip():
        passages.append(passage)
    return passages


def place_of(passage: str) -> float:
    """A passage's place between 0 and 1, from its characters alone."""
    return int.from_bytes(hashlib.sha256(passage.encode()).digest()[:8], "big") / 2**64


def split_text(documents: list[str], tokenizer: Any, options: Options) -> tuple[list[str], list[str]]:
    """(validation, training): lists of texts. The split depends on the text and on train.validation, never on the seed
    or the round, so that no run trains on what another one validates with.

    Passages placed below train.validation are kept from training, in the order of their places, so that the first of
    them are a fair sample; a small corpus gives more, until they fill a sequence. Equal passages share a side.
    What is left between them in a document stays together, up to about a sequence."""
    length = options["sequence_length"]
    cut = [[(place_of(passage), passage) for passage in cut_passages(document)] for document in documents]
    every = sorted(placed for document in cut for placed in document)
    count = sum(place < options["validation"] for place, _ in every)
    while count < len(every) and not has_sequence([text for _, text in every[:count]], tokenizer, length):
        count += 1
    edge = every[count - 1][0] if count else -1.0
    training = []
    for document in cut:
        text = ""
        for place, passage in document:
            text += passage if place > edge else ""
            if text and (place <= edge or len(text) >= 4 * length):
                training.append(text)
                text = ""
        if text:
            training.append(text)
    if not has_sequence(training, tokenizer, length):
        size = sum(len(passage) for _, passage in every)
        raise Refused(
            f"the data is too short: its {size} characters do not make one sequence of {length} tokens for training "
            "and one for validation; lower train.sequence_length or give more text"
        )
    return [passage for _, passage in every[:count]], training


def has_sequence(texts: list[str], tokenizer: Any, length: int) -> bool:
    return next(sequences(texts, tokenizer, length), None) is not None


def sequences(texts: list[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """The texts as rows of length + 1 token ids (a row's last is the next one's first), packed, with the tokenizer's
    end token between texts. Texts are tokenized as rows are asked for: a short run on a large corpus starts at once."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    waiting = []
    for start in range(0, len(texts), 64):
        some = tokenizer(texts[start : start + 64], add_special_tokens=False, return_attention_mask=False)
        for ids in some["input_ids"]:
            waiting += ids + end
        place = 0
        while len(waiting) - place > length:
            yield waiting[place : place + length + 1]
            place += length
        del waiting[:place]


def training_batches(texts: list[str], tokenizer: Any, options: Options, seed: int) -> Iterator[torch.Tensor]:
    """Batches without end: the texts reshuffled for each pass, their sequences drawn from a pool."""
    dice, texts = random.Random(seed), list(texts)
    pool: list[list[int]] = []
    batch: list[list[int]] = []
    while True:
        dice.shuffle(texts)
        for row in sequences(texts, tokenizer, options["sequence_length"]):
            pool.append(row)
            if len(pool) >= POOL:
                batch.append(pool.pop(dice.randrange(len(pool))))
            if len(batch) == options["batch"]:
                yield torch.tensor(batch)
                batch = []


def validation_rows(texts: list[str], tokenizer: Any, options: Options) -> torch.Tensor:
    most = options["validation_batches"] * options["batch"] or math.inf
    rows = []
    for row in sequences(texts, tokenizer, options["sequence_length"]):
        rows.append(row)
        if len(rows) >= most:
            break
    return torch.tensor(rows)


def load_tokenizer(folder: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise Refused(f"cannot load the tokenizer of {folder}: {one_line(error)}") from None


def load_model(folder: str, device: torch.device) -> Any:
    """The model in float32, whatever its checkpoint holds: small updates vanish in 16-bit weights."""
    try:
        model, seen = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        raise Refused(f"cannot load the model {folder}: {one_line(error)}") from None
    amiss = sorted(map(str, {*seen["missing_keys"], *seen["mismatched_keys"]}))
    if amiss:
        raise Refused(f"the model {folder} is not whole: {amiss[0]} is missing or misshapen ({len(amiss)} in all)")
    return model.to(device)


def stored_dtypes(folder: str) -> dict[str, torch.dtype | None]:
    """Tensor name -> dtype (None: not a floating-point one), as the safetensors headers of the folder say."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found.update({name: DTYPES.get(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"})
    return found


def save_model(model: Any, dtypes: dict[str, torch.dtype | None], out: Path) -> None:
    """Write the weights under the names and in the dtypes of the base, and config.json, each file by a rename."""
    floating = [dtype for dtype in dtypes.values() if dtype]
    usual = max(floating, key=floating.count)
    for name, tensor in model.named_parameters():
        tensor.data = tensor.data.to(dtypes.get(name) or usual)
    for name, tensor in model.named_buffers():
        tensor.data = tensor.data.to(dtypes.get(name) or tensor.dtype)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as folder:
            model.save_pretrained(folder)
            # A tied tensor is one, whichever of its names a writer uses: all of them lie in one place.
            places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
            written = {places.get(name, name): name for name in stored_dtypes(folder)}
            held = {places.get(name, name): name for name in dtypes}
            odd = [{**written, **held}[place] for place in written.keys() ^ held.keys()]
            if odd:
                raise Refused(
                    f"transformers writes other tensors than the base holds ({min(odd)}): open the base with "
                    "AutoModelForCausalLM.from_pretrained and write it again with save_pretrained before a campaign"
                )
            for path in [*Path(folder).glob("*.safetensors*"), Path(folder, "config.json")]:
                path.replace(out / path.name)
    except (OSError, SafetensorError) as error:
        raise Refused(f"cannot write the model to {out}: {one_line(error)}") from None


def computing(device: torch.device, options: Options) -> Any:
    """The context in which the model runs: mixed precision (weights stay float32) or plain float32."""
    dtype = options["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def loss_of(model: Any, rows: torch.Tensor, options: Options, reduction: str = "mean") -> torch.Tensor:
    """The loss of predicting each row's tokens but the first, each from those before it."""
    highest = model.get_input_embeddings().num_embeddings
    if int(rows.max()) >= highest:
        raise Refused(f"the tokenizer gives token {int(rows.max())}, but the model knows {highest} tokens")
    rows = rows.to(model.device)
    with computing(model.device, options):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


def evaluate(model: Any, rows: torch.Tensor, options: Options, until: float) -> dict[str, float] | None:
    """Mean loss per token of the rows, or of as many as fit before `until` and GRACE after a signal (None: of none)."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for some in rows.split(options["batch"]):
            if time.time() >= (min(until, stopped_by[0][1] + GRACE) if stopped_by else until):
                break
            total += loss_of(model, some, options, "sum").item()
            tokens += some[:, 1:].numel()
    if not tokens:
        return None
    loss = total / tokens
    if not math.isfinite(loss):
        raise Refused("the model's loss on the validation text is not finite: its weights are broken")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def learning_rate(step: int, total: int, options: Options) -> float:
    """The rate of a step counted from 0 at the start of the campaign, of `total` planned."""
    warmup, least = options["warmup_steps"], options["min_lr_ratio"]
    if step < warmup:
        return options["lr"] * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    part = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[options["schedule"]]
    return options["lr"] * (least + (1.0 - least) * part)


def make_optimizer(model: Any, options: Options) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options["weight_decay"]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options["lr"], betas=(0.9, 0.95), fused=True)


def train_steps(
    model: Any, batches: Iterator[torch.Tensor], options: Options, ask: dict[str, Any]
) -> tuple[list[float], float]:
    """Up to ask["steps"] steps, fewer after a signal or when the next one would not leave `spare` seconds before the
    deadline. Returns the losses and the last learning rate."""
    optimizer, losses, rate, longest = make_optimizer(model, options), [], 0.0, 0.0
    model.train()
    for step in range(ask["steps"]):
        begun = time.monotonic()
        if stopped_by or time.time() + longest + ask["spare"] > ask["deadline"]:
            print(f"train.py: {what_stops()} ends the training after {step} of {ask['steps']} steps", flush=True)
            break
        rate = learning_rate(ask["behind"] + step, ask["total"], options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, next(batches), options)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"] or math.inf)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise Refused(f"the loss or its gradient is not finite at step {step + 1} (learning rate {rate:g})")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        longest = max(longest, time.monotonic() - begun)
        if step % max(1, ask["steps"] // 100) == 0 or step + 1 == ask["steps"]:
            place = f"step {ask['behind'] + step + 1}/{ask['total']}"
            print(f"train.py: {place} loss {losses[-1]:.4f} lr {rate:.6g} norm {norm.item():.3f}", flush=True)
    return losses, rate


def train(order: dict[str, Any], options: Options, device: torch.device) -> dict[str, Any]:
    base, out = asked("FLCTL_MODEL"), Path(asked("FLCTL_OUT"))
    steps, behind = number("FLCTL_STEPS", options["steps"]), number("FLCTL_GLOBAL_STEP", 0)
    if steps < 1:
        raise Refused(f"FLCTL_STEPS is {steps}: there is nothing to do")
    deadline = number("FLCTL_DEADLINE", math.inf, float)
    rows, training, tokenizer = read_data(base, options)
    begun = time.monotonic()
    model = load_model(base, device)
    dtypes = stored_dtypes(base)
    if not any(dtypes.values()):
        raise Refused(f"the model {base} has no safetensors weights")
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    if options["sequence_length"] > longest:
        raise Refused(f"train.sequence_length is {options['sequence_length']}, but the model ends at {longest} tokens")
    saving = 1.0 + time.monotonic() - begun  # writing the model takes about as long as reading it
    begun = time.monotonic()
    before = evaluate(model, rows, options, time.time() + (deadline - time.time()) / 4)
    looking = time.monotonic() - begun

    total = number("FLCTL_TOTAL_STEPS", 0) or behind + steps
    ask = {"steps": steps, "behind": behind, "total": total, "deadline": deadline, "spare": saving + looking}
    batches = training_batches(training, tokenizer, options, number("FLCTL_SEED", 0))
    losses, rate = train_steps(model, batches, options, ask)
    if not losses:
        raise Refused(f"{what_stops()} came before the first step was done: there is nothing to save")
    save_model(model, dtypes, out)
    # What was saved is what is looked at, in the precision it was saved in.
    after = evaluate(model.float(), rows, options, deadline)
    count = len(losses) * options["batch"]
    return {
        "samples": count,
        "tokens": count * options["sequence_length"],
        "steps": len(losses),
        "train_loss": sum(losses) / len(losses),
        "lr": rate,
        "evaluation": {"base": before, **({"trained": after} if after else {})},
    }


def evaluate_subjects(order: dict[str, Any], options: Options, device: torch.device) -> dict[str, Any]:
    """The perplexity of each subject on this site's validation split, all with the same tokenizer."""
    folders = asked("FLCTL_SUBJECTS").splitlines()
    names = [subject["name"] for subject in order["subjects"]]
    if len(names) != len(folders):
        raise Refused(f"the order names {len(names)} subjects, FLCTL_SUBJECTS {len(folders)} folders")
    deadline = number("FLCTL_DEADLINE", math.inf, float)
    rows, _, _ = read_data(os.environ.get("FLCTL_MODEL") or folders[0], options)
    found: dict[str, Any] = {}
    for name, folder in zip(names, folders, strict=True):
        share = (deadline - time.time()) / (len(names) - len(found))
        found[name] = evaluate(load_model(folder, device), rows, options, time.time() + share)
        if not found[name]:
            raise Refused(f"{what_stops()} came before {name} was evaluated")
        print(f"train.py: {name} perplexity {found[name]['perplexity']:.3f}", flush=True)
    return {"evaluation": found}


def read_data(model: str, options: Options) -> tuple[torch.Tensor, list[str], Any]:
    """(validation rows, training texts, tokenizer)"""
    tokenizer = load_tokenizer(model)
    files = find_files(Path(asked("FLCTL_DATA")))
    documents = [document for path in files for document in read_documents(path, options["text_field"])]
    validation, training = split_text(documents, tokenizer, options)
    rows = validation_rows(validation, tokenizer, options)
    print(
        f"train.py: {len(files)} files, {len(training)} texts to train on, {len(rows)} sequences to validate with",
        flush=True,
    )
    return rows, training, tokenizer


def write_metrics(metrics: dict[str, Any], out: Path) -> None:
    part = out / ".metrics.json.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump(metrics, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(out / "metrics.json")


def one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacks_memory(error: Exception) -> bool:
    words = ("allocate memory", "bad_alloc", "ALLOC_FAILED", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    order = read_order()
    options = read_options(order.get("train") or {})
    if os.environ.get("FLCTL_FROZEN"):
        raise Refused("FLCTL_FROZEN is set, but this trainer trains whole models, not adapters")
    seed = number("FLCTL_SEED", 0)
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = {"train": train, "evaluate": evaluate_subjects}.get(order.get("work", "train"))
    if work is None:
        raise Refused(f"the order asks for {order['work']!r}, which this trainer does not know")
    try:
        metrics = work(order, options, device)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        size = f"{options['batch']} sequences of {options['sequence_length']} tokens"
        raise Refused(f"out of memory with {size}: lower train.batch or train.sequence_length") from error
    metrics["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    metrics["seconds"] = round(time.monotonic() - BEGAN, 3)
    write_metrics(metrics, Path(asked("FLCTL_OUT")))
    print(f"train.py: done in {metrics['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Refused as reason:
        sys.exit(f"train.py: error: {reason}")
    sys.stdout.flush()
    os._exit(0)  # all is written; the interpreter's own way out takes 0.6 s to free what the system frees at once
