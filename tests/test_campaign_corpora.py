"""The demo's corpora: made up the same way every time, private to each language, and unlike each other."""

import itertools
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from flctl.campaign.corpora import write_corpus

LANGUAGES = ["italian", "czech"]
OWN_LETTERS = {"italian": set("àèéìòù"), "czech": set("áčďéěíňóřšťúůýž")}


def corpus(language: str, folder: Path, seed: int = 1) -> dict[str, str]:
    write_corpus(language, folder, seed=seed)
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}


def surprise(teacher: str, text: str) -> float:
    """Nats per character of `text` for a bigram model of `teacher`."""
    pairs, firsts = Counter(itertools.pairwise(teacher)), Counter(teacher)
    letters = len(set(teacher + text))
    chances = ((pairs[pair] + 1) / (firsts[pair[0]] + letters) for pair in itertools.pairwise(text))
    return -sum(math.log(chance) for chance in chances) / (len(text) - 1)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_same_seed_gives_the_same_files_and_another_one_other_texts(language, tmp_path):
    first = corpus(language, tmp_path / "first")
    assert corpus(language, tmp_path / "again") == first
    other = corpus(language, tmp_path / "other", seed=2)
    assert other.keys() == first.keys()
    assert not set(other.values()) & set(first.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_corpus_is_several_documents_of_60_to_100_kilobytes_together(language, tmp_path):
    documents = corpus(language, tmp_path)
    assert len(documents) >= 10
    assert 60_000 <= sum(len(text.encode()) for text in documents.values()) <= 100_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_vary_and_are_whole(language, tmp_path):
    paragraphs = [line for text in corpus(language, tmp_path).values() for line in text.split("\n\n")[1:]]
    assert all(line.strip()[0].isupper() or line[0] in "«„" for line in paragraphs)
    assert all(line.strip().endswith(".") for line in paragraphs)
    assert not re.search(r"[|/{}_]|  ", "".join(paragraphs))
    sentences = [sentence for line in paragraphs for sentence in re.split(r"(?<=\.) ", line)]
    assert len(set(sentences)) > 0.95 * len(sentences)


def test_each_language_has_its_own_letters(tmp_path):
    for language in LANGUAGES:
        text = "".join(corpus(language, tmp_path / language).values())
        assert len(OWN_LETTERS[language] & set(text)) >= 5
    assert "ř" not in "".join(corpus("italian", tmp_path / "italian").values())


def test_each_language_is_foreign_to_a_model_of_the_other(tmp_path):
    texts = {language: "".join(corpus(language, tmp_path / language).values()) for language in LANGUAGES}
    unseen = {
        language: "".join(corpus(language, tmp_path / "unseen" / language, seed=9).values()) for language in texts
    }
    for own, other in (LANGUAGES, reversed(LANGUAGES)):
        assert surprise(texts[other], unseen[own]) > surprise(texts[own], unseen[own]) + 1.0
