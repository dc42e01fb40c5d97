"""What is read of a model directory, and what of it goes with a trained model: no file that is not what its name says."""

import errno
import json
import os

import pytest
from support import ASSETS, call, save_with_tokenizer, tiny

import hf
from hf.reading import MOST_BYTES, read_file, read_json
from runtime.process import UserError


PRIVATE = {
    "a key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n-----END OPENSSH PRIVATE KEY-----\n",
    "passwords": "#version 2 of my passwords\nbank hunter2\n  a longer line of them\n",
    "a cloud's": json.dumps({"type": "service_account", "private_key_id": "1f", "private_key": "k", "client_id": "7"}),
    "a service's": json.dumps({"api_key": "sk-1", "model": "large", "temperature": 0.7, "max_tokens": 100}),
    "a session": json.dumps({"access_token": "a", "refresh_token": "b", "id_token": "c", "expires_in": 3600}),
    "a list": json.dumps(["hunter2"]),
    "bytes": b"\x00\xff\xfe key",
}
# They go with a trained model as they are, or some of what is in them does.
CARRIED = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json", "generation_config.json",
           "chat_template.jinja", "config.json", "tokenizer.json", "model.safetensors")
# All that is read of a directory.
READ = (*CARRIED, "model.safetensors.index.json")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A directory with a model in it, and data; it is the current one."""
    save_with_tokenizer(tiny(vocab_size=hf.load_tokenizer(ASSETS).n_vocab), tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(monkeypatch, capsys):
    """What train.py says of the model; nothing is trained."""
    code = call(monkeypatch, "--init", "model", "--data", "data.jsonl", "--steps", 1, "--dtype", "float32", "--out", "run")
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1010
    assert not os.path.exists("run") and "hunter2" not in error and "b3BlbnNzaC1rZXk" not in error
    return error


def replace(name, target):
    """The model's file of this name is now a link. An index is only looked at where there is no single file."""
    if name == "model.safetensors.index.json":
        os.rename("model/model.safetensors", "model/model-00001-of-00001.safetensors")
    if os.path.exists(f"model/{name}"):
        os.remove(f"model/{name}")
    os.symlink(target, f"model/{name}")


@pytest.mark.slow
@pytest.mark.parametrize("secret", PRIVATE)
@pytest.mark.parametrize("name", CARRIED)
def test_no_private_file_goes_with_a_model(work, monkeypatch, capsys, name, secret):
    content = PRIVATE[secret]
    (work / "private").write_bytes(content if isinstance(content, bytes) else content.encode())
    replace(name, work / "private")
    assert "model" in refusal(monkeypatch, capsys)


@pytest.mark.slow
def test_a_template_of_ours_is_saved_and_not_what_a_directory_has_for_one(work, monkeypatch):
    (work / "private").write_text(PRIVATE["a key"])
    replace("chat_template.jinja", work / "private")
    assert call(monkeypatch, "--init", "model", "--data", "data.jsonl", "--steps", 1, "--dtype", "float32", "--chat-format", "plain", "--out", "run") == 0
    assert all(b"OPENSSH" not in file.read_bytes() for file in (work / "run").rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["/proc/self/environ", "/proc/self/mem", "/sys/kernel/mm/transparent_hugepage/enabled", "/dev/zero", "/dev/null",
                                    "model", "nowhere", "loop", "pipe"])
@pytest.mark.parametrize("name", READ)
def test_nothing_of_the_system_is_read_and_nothing_but_regular_files(work, monkeypatch, capsys, name, target):
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    replace(name, target if target.startswith("/") else work / target)
    error = refusal(monkeypatch, capsys)
    assert f"model/{name} is, or leads to, /" in error and "expected a regular file" in error


@pytest.mark.slow
def test_what_a_shard_leads_to_is_looked_at_too(work, monkeypatch, capsys):
    os.remove("model/model.safetensors")
    os.symlink("/dev/zero", "model/model-00001-of-00001.safetensors")
    (work / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors is, or leads to, /dev/zero" in refusal(monkeypatch, capsys)


@pytest.mark.slow
def test_links_elsewhere_are_followed(work, monkeypatch):
    """The hub's cache is made of them."""
    os.rename("model", "blobs")
    os.mkdir("model")
    for file in (work / "blobs").iterdir():
        os.symlink(f"../blobs/{file.name}", f"model/{file.name}")
    assert call(monkeypatch, "--init", "model", "--data", "data.jsonl", "--steps", 1, "--dtype", "float32", "--out", "run") == 0
    assert not any(file.is_symlink() for file in (work / "run" / "model").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MOST_BYTES.keys() - {"adapter_config.json"}))   # that one: test_adapter.py
def test_a_file_that_is_larger_than_any_is_not_read(work, monkeypatch, capsys, name):
    if name == "model.safetensors.index.json":
        os.remove("model/model.safetensors")
    with open(f"model/{name}", "wb") as f:
        f.truncate(60 * 2 ** 30)                                          # which takes no room on the disk
    assert f"model/{name} has {60 * 2 ** 30} bytes; expected {MOST_BYTES[name]} at most" in refusal(monkeypatch, capsys)


def test_what_is_nested_deeper_than_can_be_written_is_refused(tmp_path):
    for levels, is_read in ((100, True), (101, False), (900, False), (100_000, False)):
        text = "[" * levels + "]" * levels
        (tmp_path / "config.json").write_text(text)
        if is_read:
            assert json.dumps(read_json(tmp_path / "config.json")) == text
            continue
        with pytest.raises(ValueError, match="nested"):
            read_json(tmp_path / "config.json")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        read_file(tmp_path / "config.json")
    assert e.value.errno == errno.ENOENT and e.value.filename == str(tmp_path / "config.json")


# ---------------------------------------------------------------------------------------------------------------------
# What is published goes with a model

TOKEN = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
ADDED = {"2": {**TOKEN, "special": True}}
PUBLISHED = {
    "GPT-2": {"tokenizer_config.json": {"model_max_length": 1024}, "vocab.json": {"!": 0, "\u0120the": 262},
              "merges.txt": "#version: 0.2\n\u0120 t\nh e\n", "generation_config.json": {"_from_model_config": True, "bos_token_id": 50256}},
    "Qwen2": {"merges.txt": "#version: 0.2\n\u0120 \u0120\n\u0120\u0120 \u0120\u0120\n# #\ni n", "added_tokens.json": {"<|im_end|>": 151645},
              "special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>"], "eos_token": TOKEN, "pad_token": "<|endoftext|>"},
              "tokenizer_config.json": {"add_prefix_space": False, "added_tokens_decoder": ADDED, "bos_token": None},
              "generation_config.json": {"bos_token_id": 1, "do_sample": True, "eos_token_id": [1, 2], "repetition_penalty": 1.05, "top_k": 20}},
    "SmolLM2": {"merges.txt": "#version: 0.2\nt h\n", "vocab.json": {"<|endoftext|>": 0}, "generation_config.json": {"transformers_version": "4.42.3"}},
    "Llama": {"special_tokens_map.json": {"bos_token": TOKEN, "eos_token": TOKEN, "unk_token": TOKEN},
              "tokenizer_config.json": {"add_bos_token": True, "legacy": False, "tokenizer_class": "LlamaTokenizer"},
              "generation_config.json": {"temperature": 0.6, "top_p": 0.9, "max_length": 4096, "transformers_version": "4.31.0.dev0"}},
    "Mistral": {"added_tokens.json": {}, "special_tokens_map.json": {"bos_token": "<s>"}, "tokenizer_config.json": {"sp_model_kwargs": {}, "unk_token": "<unk>"}},
    "Phi": {"added_tokens.json": {"\t\t": 50294}, "merges.txt": "#version: 0.2\n\u0120 t\n", "special_tokens_map.json": {"unk_token": TOKEN}},
    "DeepSeek": {"tokenizer_config.json": {"add_bos_token": True, "bos_token": {"__type": "AddedToken", **TOKEN}, "chat_template": "{{ messages }}"},
                 "generation_config.json": {"temperature": 0.6, "top_p": 0.95, "do_sample": True}},
    "transformers 5": {"tokenizer_config.json": {"backend": "tokenizers", "is_local": False, "model_max_length": 8}, "generation_config.json": {}},
    "WizardCoder's empty list": {"merges.txt": "#version: 0.2 - Trained by `huggingface/tokenizers`\n"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_goes_with_a_model(tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    contents = {file: content if isinstance(content, str) else json.dumps(content) for file, content in PUBLISHED[name].items()}
    for file, content in contents.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    generation = hf.generation_config(tmp_path)
    saved = hf.files_beside_model(hf.load_tokenizer(tmp_path), [3], generation)
    assert json.loads(saved.pop("generation_config.json")) == {**PUBLISHED[name].get("generation_config.json", {}), "eos_token_id": 3}
    contents.pop("generation_config.json", None)
    assert {file: content.decode() for file, content in saved.items() if file != "tokenizer.json"} == contents


@pytest.mark.parametrize("name, content, words", [
    ("vocab.json", '{"a": "b"}', "expected an object of tokens and their ids"),
    ("vocab.json", '{"a": true}', "expected an object of tokens and their ids"),
    ("added_tokens.json", '{"a": 1.5}', "expected an object of tokens and their ids"),
    ("merges.txt", "a b\nc  d\n", "expected two pieces of a token a line, after #version if that is there"),
    ("merges.txt", "#version: 0.2\na b\nc d e\n", "two pieces"),
    ("merges.txt", "#version: 0.2\na b\n\n\nc\n", "two pieces"),
    ("special_tokens_map.json", '{"eos_token": "</s>", "api_token": "k"}', "an object of tokens and their names"),
    ("tokenizer_config.json", '{"model": "gpt", "key": "k"}', "some of the keys tokenizer_class, "),
    ("tokenizer_config.json", "{", "expected"),
])
def test_what_is_not_what_its_name_says_does_not(tmp_path, name, content, words):
    (tmp_path / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    tokenizer = hf.load_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is not what its name says.*{words}"):
        hf.files_beside_model(tokenizer, [3], {})
