"""Prompts and their token ids against the reference's, with its fixtures' tokenizer."""

import json

import pytest

from vla_oft.vlm import sizes, tokens

FIRST_ACTION_ID = 31744


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "parity" / "pure_functions" / "prompts_and_tokenization.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(shared):
    return tokens.load_tokenizer(shared / "parity" / "libero-l1" / "checkpoint")


@pytest.mark.shared
def test_a_prompt_at_inference(recorded, tokenizer):
    """Ours has no leading BOS, and ends in the empty token, which the reference appends afterwards."""
    encoder = tokens.PromptEncoder(tokenizer, sizes.LLAMA2_TOKENS, "openvla", verbatim=True)
    for case in recorded:
        assert tokens.PROMPTS["openvla"].format(instruction=case["task"].lower()) == case["eval_prompt"]
        assert encoder.ids(case["task"]) == [*case["eval_ids"][1:], sizes.LLAMA2_TOKENS.empty], case["task"]


@pytest.mark.shared
def test_a_prompt_in_training(recorded, tokenizer):
    """What the reference trains on in front of the actions is the prompt of inference, but for `<image>`, which its training removes."""
    encoder = tokens.PromptEncoder(tokenizer, sizes.LLAMA2_TOKENS, "openvla", verbatim=True)
    for case in recorded:
        task = case["task"].replace("<image>", "")
        before_actions = [i for i in case["train_ids"] if i < FIRST_ACTION_ID and i != sizes.LLAMA2_TOKENS.stop]
        assert encoder.ids(task) == before_actions[1:], case["task"]
        assert case["train_ids"][0] == sizes.LLAMA2_TOKENS.bos and case["train_ids"][-1] == sizes.LLAMA2_TOKENS.stop


@pytest.mark.shared
def test_our_own_policies_ignore_white_space_around_an_instruction(recorded, tokenizer):
    encoder = tokens.PromptEncoder(tokenizer, sizes.LLAMA2_TOKENS, "openvla")
    for case in recorded:
        ids = [*case["eval_ids"][1:], sizes.LLAMA2_TOKENS.empty]
        assert (encoder.ids(case["task"]) == ids) == (case["task"] == case["task"].strip())
