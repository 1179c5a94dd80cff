"""Owns the tiny base model that the adapters are trained for, and the scoring of a base with an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.appfl.task import LABELS, alpaca, prompt, records

ROWS = 16
RATE = 3e-3
LONGEST = 256  # tokens of a sequence


def write_base(folder: Path, *, seed: int, steps: int, width: int = 64) -> Path:
    """A tiny Llama that knows the prompts' form and the three answers, but not which one is right."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [alpaca(record) for record in records(ROWS * steps, seed, blind=True)]
    tokenizer = _word_tokenizer([prompt(item) + str(item["output"]) for item in texts])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            initializer_range=0.08,  # see flctl/model/tiny.py
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(steps):
        batch = [prompt(item) + str(item["output"]) for item in texts[step * ROWS : (step + 1) * ROWS]]
        loss = model(**_padded(tokenizer, batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _word_tokenizer(texts: Sequence[str]) -> Any:
    """One token per word and sign: the task has few, and a sequence of them is a fifth of one of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cut = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text)})
    vocabulary = {word: place for place, word in enumerate(["<|unknown|>", "<|end|>", "<|pad|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = cut
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=LONGEST,
    )


def _padded(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    import torch

    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    mask = (ids != tokenizer.pad_token_id).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def score(base: Path, adapter: Path | None, test: Sequence[dict[str, object]]) -> tuple[float, float]:
    """(share of records whose right answer is the likeliest of the three, mean loss of the right answers' tokens)"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    right, loss, tokens = 0, 0.0, 0
    with torch.inference_mode():
        for record in test:
            losses = {label: _answer_loss(model, tokenizer, prompt(record), label) for label in LABELS}
            right += min(losses, key=lambda label: losses[label][0]) == record["output"]
            loss += losses[str(record["output"])][0]
            tokens += losses[str(record["output"])][1]
    return right / len(test), loss / tokens


def _answer_loss(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[float, int]:
    """(sum of the losses of the answer's tokens, how many they are)"""
    import torch

    head, tail = tokenizer(question)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([head + tail])
    logits = model(input_ids=ids).logits[0, len(head) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, len(head) :], reduction="sum")
    return loss.item(), len(tail)
