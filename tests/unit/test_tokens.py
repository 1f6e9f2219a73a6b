"""Prompts to ids."""

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
