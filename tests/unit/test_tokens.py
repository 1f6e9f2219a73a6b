"""Prompts to ids."""

import hashlib
import itertools

import pytest

from vla_oft.vlm import tokens

CORPUS = ["touch the red block", "place it on the plate"]


@pytest.fixture(scope="module")
def trained():
    return tokens.train_tokenizer(CORPUS, 640)


def test_words_of_the_corpus_are_single_tokens(trained):
    tokenizer, ids = trained
    encoder = tokens.PromptEncoder(tokenizer, ids, "plain")
    assert len(encoder.ids("touch the red plate")) == 4 + 1
    assert encoder.ids("touch the red plate")[-1] == ids.empty


@pytest.mark.parametrize("text", ["grüne Tasse 你好", "<0x0A> <s> </s>", "a\tb", "\U0001f916"])
def test_any_text_can_be_encoded_and_read_back(trained, text):
    tokenizer, ids = trained
    encoded = tokenizer.encode(text, add_special_tokens=False).ids
    assert max(encoded) < ids.num_tokens - 256, "action tokens must stay free"
    assert tokenizer.decode(encoded, skip_special_tokens=False).strip() == text.strip()


def test_text_cannot_forge_special_tokens(trained):
    tokenizer, ids = trained
    encoded = tokens.PromptEncoder(tokenizer, ids, "plain").ids("touch </s> <PAD> the block")
    assert not {ids.stop, ids.pad, ids.bos} & set(encoded)


def test_case_and_spaces_around_do_not_matter(trained):
    encoder = tokens.PromptEncoder(trained[0], trained[1], "plain")
    assert encoder.ids("  Touch the RED block ") == encoder.ids("touch the red block")


def test_padding_lies_on_the_left(trained):
    encoder = tokens.PromptEncoder(trained[0], trained[1], "plain")
    ids, mask = encoder(["touch", "touch the red block"])
    assert mask[1].all() and mask[0].tolist() == [False] * (ids.shape[1] - 2) + [True, True]
    assert (ids[0][~mask[0]] == trained[1].pad).all()


def test_a_blind_prompt_is_the_same_for_every_instruction(trained):
    encoder = tokens.PromptEncoder(trained[0], trained[1], "blind")
    assert encoder.ids("touch the red block") == encoder.ids("place it on the plate")


def test_the_same_corpus_gives_the_same_tokenizer():
    assert tokens.train_tokenizer(CORPUS, 640)[0].to_str() == tokens.train_tokenizer(CORPUS, 640)[0].to_str()


def test_the_shipped_policys_tokenizer_never_changes():
    """Its corpus as it was when the policy was trained. Retraining would give these ids another meaning."""
    templates = (
        "touch the {} block",
        "push the {} block forward",
        "lift the {} block",
        "stack the {} block on the {} block",
        "touch push lift pick up grasp put place stack move open close",
        "the red green blue yellow purple block and it on onto into plate forward",
        "pick up the red block and place it on the plate",
    )
    colours = ("red", "green", "blue", "yellow", "purple")
    corpus = sorted({template.format(*pair) for template in templates for pair in itertools.permutations(colours, 2)})
    tokenizer, ids = tokens.train_tokenizer(corpus, 768)
    assert hashlib.sha256(tokenizer.to_str().encode()).hexdigest().startswith("6546660be9887761")
    assert ids == tokens.Config(bos=1, stop=2, pad=3, empty=286, num_tokens=768)


@pytest.mark.parametrize("vocab_size", [543, 640])
def test_a_corpus_of_many_characters_leaves_the_action_ids_free(vocab_size):
    corpus = [*CORPUS, "".join(chr(0x4E00 + i) for i in range(700))]
    tokenizer, ids = tokens.train_tokenizer(corpus, vocab_size)
    assert max(tokenizer.get_vocab().values()) < ids.num_tokens - 256
    assert tokenizer.to_str() == tokens.train_tokenizer(corpus, vocab_size)[0].to_str()
    encoded = tokenizer.encode(corpus[-1][-5:], add_special_tokens=False).ids
    assert 0 not in encoded and tokenizer.decode(encoded) == corpus[-1][-5:], "rare characters go through bytes"


def test_a_vocabulary_too_small_for_letters_and_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=542 is too small: .* need at least 543"):
        tokens.train_tokenizer(CORPUS, 542)


def test_a_corpus_that_spells_out_special_tokens_does_not_create_them():
    text = "x</s> y</s> z</s> x<0x0A> y<0x0A> z<0x0A>"
    tokenizer, ids = tokens.train_tokenizer([text, "w</s> w<0x0A>"] * 50, 768)
    encoded = tokenizer.encode("v</s> v<0x0A>", add_special_tokens=False).ids
    assert not {ids.stop, tokenizer.token_to_id("<0x0A>")} & set(encoded)
    assert tokenizer.decode(encoded, skip_special_tokens=False) == "v</s> v<0x0A>"


def test_merges_written_as_text_by_older_libraries_are_read(monkeypatch):
    expected = tokens.train_tokenizer(CORPUS, 640)[0].to_str()
    loads = tokens.json.loads

    def old(text: str) -> dict:
        document = loads(text)
        document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
        return document

    monkeypatch.setattr(tokens.json, "loads", old)
    assert tokens.train_tokenizer(CORPUS, 640)[0].to_str() == expected
