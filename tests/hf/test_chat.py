"""Chat formats against rendered templates, and what ends an answer."""

import json

import pytest
from support import ASSETS, tiny
from tokenizer_files import CHATML, LLAMA3, SPECIAL, assets_with, build

import data
import hf
from runtime.process import UserError


TURNS = [("system", "Be brief."), ("user", "\nWhy? \n"), ("assistant", "So. "), ("user", "And 'p53'?"), ("assistant", "It  depends.")]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    return hf.load_tokenizer(assets_with(tmp_path / "tokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize("name,template", [("chatml", CHATML), ("llama3", LLAMA3)])
def test_a_conversation_is_what_the_template_makes_of_it(tmp_path, name, template):
    import transformers
    build("llama3", tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|begin_of_text|>")
    theirs.chat_template = template
    ours = hf.load_tokenizer(tmp_path)
    messages = [{"role": role, "content": text} for role, text in TURNS]
    ids, response = hf.encode_turns(TURNS, ours, name)
    assert ids == theirs.apply_chat_template(messages, return_dict=False)
    asked, _ = hf.encode_turns([*TURNS[:4], ("assistant", None)], ours, name)
    assert asked == theirs.apply_chat_template(messages[:4], add_generation_prompt=True, return_dict=False)
    answers = "So. <|im_end|>It  depends.<|im_end|>" if name == "chatml" else "So.<|eot_id|>It  depends.<|eot_id|>"
    assert ours.decode([i for i, r in zip(ids, response) if r]) == answers
    assert hf.compare_template(tmp_path, ours, name) is None              # it has no template


# What is response stands between [ and ].
WRITTEN = {
    "plain": "Be brief.\n\nWhy? \n\n[So. <|endoftext|>]And 'p53'?\n[It  depends.<|endoftext|>]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n\nWhy? \n<|im_end|>\n<|im_start|>assistant\n[So. <|im_end|>]\n"
              "<|im_start|>user\nAnd 'p53'?<|im_end|>\n<|im_start|>assistant\n[It  depends.<|im_end|>]\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n[So.<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nAnd 'p53'?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n[It  depends.<|eot_id|>]",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_writes_and_marks_its_turns(tokenizer, name):
    ids, response = hf.encode_turns(TURNS, tokenizer, name)
    assert "".join(marked_tokens(ids, response, tokenizer)) == WRITTEN[name]
    asked, response = hf.encode_turns([*TURNS[:4], ("assistant", None)], tokenizer, name)
    assert asked == ids[:len(asked)] and tokenizer.decode(asked) == WRITTEN[name][:WRITTEN[name].rindex("[")].replace("[", "").replace("]", "")
    assert response[-1] is False
    assert {tokenizer.special[token] for token in SPECIAL if token in WRITTEN[name]} <= set(ids)   # as tokens, not as text


def marked_tokens(ids, response, tokenizer):
    for i, token in enumerate(ids):
        if response[i] and not response[i - 1]:
            yield "["
        yield tokenizer.decode([token])
        if response[i] and not (i + 1 < len(ids) and response[i + 1]):
            yield "]"


def test_prompt_and_response_are_encoded_separately():
    tokenizer = hf.load_tokenizer(ASSETS)
    ids, _ = hf.encode_turns([("user", "x"), ("assistant", " y")], tokenizer)
    assert ids == [*tokenizer.encode("x"), *tokenizer.encode("\n"), *tokenizer.encode(" y"), tokenizer.eos_id]


def test_a_text_is_all_response(tokenizer):
    for name, begin in (("plain", ""), ("chatml", ""), ("llama3", "<|begin_of_text|>")):
        (sample,), _ = data.load_samples("file", tokenizer, name, rows=[(1, {"text": "Some text."})])
        assert tokenizer.decode(sample.ids) == begin + "Some text.<|endoftext|>"
        assert sample.response.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_special_tokens_choose_the_format_and_a_flag_overrides(tokenizer):
    assert hf.find_format("auto", tokenizer) == "llama3" and hf.find_format("plain", tokenizer) == "plain"
    assert hf.begin_ids(tokenizer) == [tokenizer.special["<|begin_of_text|>"]]
    for lost, expected in (("<|eot_id|>", "chatml"), ("<|im_end|>", "plain")):
        del tokenizer.special[lost]
        assert hf.find_format("auto", tokenizer) == expected
    with pytest.raises(UserError, match="chatml needs the special token <|im_end|>"):
        hf.find_format("chatml", tokenizer)
    assert hf.begin_ids(hf.load_tokenizer(ASSETS)) == []


def test_an_answer_ends_where_model_tokenizer_or_chat_format_say(tokenizer):
    im_end = tokenizer.special["<|im_end|>"]
    model = tiny(vocab_size=tokenizer.n_vocab, eos_token_id=tokenizer.eos_id)
    config = hf.config_from_dict({**model.config.hf, "eos_token_id": [11, 12]})
    assert hf.stop_ids(config, {"eos_token_id": 13}, tokenizer, "chatml") == [11, 12, 13, tokenizer.eos_id, im_end]
    assert hf.stop_ids(model.config, {}, tokenizer, "plain") == [tokenizer.eos_id]


# ---------------------------------------------------------------------------------------------------------------------
# The model's own template

def test_a_template_that_does_more_is_quoted(tokenizer, tmp_path):
    config, file = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    for written in ({"chat_template": CHATML}, {"chat_template": [{"name": "tools", "template": ""}, {"name": "default", "template": CHATML}]}):
        config.write_text(json.dumps(written))
        assert hf.compare_template(tmp_path, tokenizer, "chatml") is None
    assert "<|start_header_id|>" in hf.compare_template(tmp_path, tokenizer, "llama3")   # another format than the directory's
    system = "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}"
    file.write_text(system + CHATML)                                      # transformers 5's place for it, which wins
    words = hf.compare_template(tmp_path, tokenizer, "chatml")
    assert "would write '<|im_start|>system\\nYou are kind.<|im_end|>" in words and words.count("QUESTION") == 2
    file.write_text(LLAMA3)
    assert hf.compare_template(tmp_path, tokenizer, "llama3") is None     # it is given the begin token
    file.write_text(
        "{% if tools is not none or documents is not none or strftime_now('%Y') < '2025' %}{{ raise_exception() }}{% endif %}" + CHATML)
    assert hf.compare_template(tmp_path, tokenizer, "chatml") is None     # what transformers gives to every template


def test_a_template_that_fails_is_a_sentence(tokenizer, tmp_path):
    for broken in ("{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ 'a' * 6000000000 }}"):
        (tmp_path / "chat_template.jinja").write_text(broken)
        assert "could not be rendered" in hf.compare_template(tmp_path, tokenizer, "chatml")


def test_templates_are_rendered_where_there_is_no_module_resource(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "resource.py").write_text("open(__file__ + '.asked', 'w')\nraise ImportError('as on Windows')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert hf.compare_template(tmp_path, tokenizer, "chatml") is None
    assert (tmp_path / "resource.py.asked").is_file()
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    assert "could not be rendered" in hf.compare_template(tmp_path, tokenizer, "chatml")
