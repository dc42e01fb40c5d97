"""Spoils what data.py and the loaders read, at random, and looks at what comes of it. test_fuzz.py tries 200 spoilt inputs.

    PYTHONPATH=.:tests python tests/fuzz.py 10000 [--seed 0] [--only jsonl] [--first 0]

Each input must end in a clean error (UserError, or what the loader's docstring says) of one line, or be loaded correctly: as a reading
of our own says, or the `tokenizers` and `safetensors` libraries; never in another exception, after more than SECONDS, or with more
memory than MEMORY. What an input is depends on --seed and its number alone, and a finding names them.
"""

import argparse
import collections
import contextlib
import copy
import gzip
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
from support import ASSETS, save_with_tokenizer, tiny
from tokenizer_files import SPECIAL, STYLES, build

import data
import hf
import hf.weights
import train
from model import GPT
from runtime.checkpoint import resume_from_checkpoint, save_checkpoint
from runtime.files import load_safetensors
from runtime.process import UserError
from runtime.process import run as run_command
from runtime.ranks import Ranks


SECONDS, MEMORY = 20, 2 * 2 ** 30                                         # of one input; of all of them together
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ '<|endoftext|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
ODD = [None, True, False, 0, -1, 1, 2, 7, 2 ** 31, 2 ** 63, 10 ** 18, 10 ** 30, "DIGITS", 0.5, -0.0, 1e308, -1e308, float("nan"), "", "x", "\0",
       "\ud800", "../../x", "/etc/passwd", "a" * 10000, "ÿ", [], {}, [[]], {"a": {}}, [1, 2], "true", "Ġ", "<|im_end|>"]
PIECES = [b"\xef\xbb\xbf", b"\0", b"\r\n", b"\r", b"\n", b"\n\n", b"\xff", b"\xc3", b"\\ud800", b"\\uDFFF", b"\\ud83d\\ude00", b"\\u0000", b"[" * 100_000,
          b'{"a":' * 3000, b"1e999", b"NaN", b"9" * 5000, b"\xe2\x80\xa8", b"\x1a", b"null", b'""', b'"', b"\\", b"{}", b",", b" ", b" " * 1_200_000]


def spoil_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i = rng.randrange(len(raw) + 1)
        j = min(len(raw), i + rng.choice((1, 2, 8, 100, 5000)))
        what = rng.randrange(7)
        if what == 0 and i < len(raw):
            raw[i] ^= 1 << rng.randrange(8)
        elif what == 1:
            raw[i:j] = rng.randbytes(j - i)
        elif what == 2:
            del raw[i:j]
        elif what == 3:
            raw[i:i] = raw[i:j]
        elif what == 4:
            del raw[i:]
        elif what == 5:
            raw[i:j] = raw[(k := rng.randrange(len(raw) + 1)):k + j - i]
        else:
            raw[i:i] = rng.choice(PIECES[:-1] if rng.random() < 0.98 else PIECES)
    return bytes(raw)


def spoil_json(value, rng):
    """A copy in which some values are gone, others, elsewhere, or under another key."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(node[key], (dict, list)) or rng.random() < 0.25:
                other = rng.choice(keys)
                what = rng.randrange(6)
                if what == 0:
                    del node[key]
                elif what == 1:
                    node[key], node[other] = node[other], node[key]
                elif what == 2 and isinstance(node[key], int):
                    node[key] += rng.choice((-1, 1, 10 ** 6))
                elif what == 3 and isinstance(node, dict):
                    node[str(rng.choice(ODD))] = node.pop(key)
                elif what == 4 and isinstance(node, list):
                    node.insert(key, copy.deepcopy(node[other]))
                else:
                    node[key] = copy.deepcopy(rng.choice(ODD))
                break
            node = node[key]
    return value


def dump(value, rng):
    """JSON text as bytes; "DIGITS" in it becomes a number of more digits than Python reads."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    return text.replace('"DIGITS"', "9" * 5000).encode(errors="surrogatepass")


def spoil_file(path, rng):
    """JSON, and the head of a safetensors file, mostly as what it says; else as bytes."""
    raw, head, tail = path.read_bytes(), b"", b""
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(raw[:8], "little")
        head, raw, tail = raw[:8], raw[8:end], raw[end:]
    if path.suffix in (".json", ".safetensors") and rng.random() < 0.8:
        raw = dump(spoil_json(json.loads(raw), rng), rng)
        head = len(raw).to_bytes(8, "little") if head else b""
        path.write_bytes(head + raw + tail)
    else:
        path.write_bytes(spoil_bytes(head + raw + tail, rng))


def refusal(call, where, *kinds):
    """(what call returns, None), or (None, the message of an error of these kinds, which says where)."""
    try:
        return call(), None
    except kinds as e:
        assert str(where) in str(e), f"an error that does not say where: {e!r}"
        return None, str(e)


# ---------------------------------------------------------------------------------------------------------------------
# A target spoils an input in an empty directory and loads it. It returns "refused" or "loaded", having looked at what.

ROWS = [{"prompt": "What?", "response": "That."}, {"prompt": "", "response": "α β\n", "group": "g"}, {"text": "Just text."},
        {"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "long " * 60, "response": "x"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B 😀"},
                      {"role": "user", "content": "C?"}, {"role": "assistant", "content": "D."}]}]


def jsonl(directory, rng, made):
    """Every line is a sample, dropped or refused, with the response that a reading of our own finds in it."""
    rows = [spoil_json(row, rng) if rng.random() < 0.15 else row for row in rng.choices(ROWS, k=rng.randint(1, 8))]
    plain = b"".join(dump(row, rng) + rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")) for row in rows)
    plain = spoil_bytes(plain, rng) if rng.random() < 0.8 else plain
    path, limit, raw = directory / "a.jsonl", rng.choice((None, None, 60)), plain
    if rng.random() < 0.3:
        path, raw = directory / "a.jsonl.gz", gzip.compress(plain, 1)
        raw = spoil_bytes(raw, rng) if rng.random() < 0.6 else raw
    path.write_bytes(raw)
    result, error = refusal(lambda: data.load_samples(path, made["tokenizer"], "plain", limit), path, UserError)
    if error:
        return "refused"
    samples, counts = result
    plain = gzip.decompress(raw) if path.suffix == ".gz" else raw
    lines = {i: line.removeprefix(b"\xef\xbb\xbf") for i, line in enumerate(plain.split(b"\n"), 1)}
    rows = {i: json.loads(line.decode()) for i, line in lines.items() if line.strip()}
    assert counts["samples"] + counts["dropped"] == len(rows) and len(samples) == counts["samples"]
    for sample in samples:
        row, encode, eos = rows[sample.line], made["tokenizer"].encode, made["tokenizer"].eos_id
        turns = [(False, ""), (True, row["response"])] if row.keys() & {"prompt", "response"} else \
            [(t["role"] == "assistant", t["content"]) for t in row["messages"]] if "messages" in row else \
            [(False, ""), (True, row["output"])] if row.keys() & {"instruction", "output"} else [(True, row["text"])]
        texts = [text for response, text in turns if response]
        ids = [i for text in texts for i in [*encode(text), eos]][turns[0][0]:]   # (a first token has no context)
        got = sample.ids[sample.response].tolist()
        assert got == ids or limit == len(sample.ids) and got == ids[:len(got)]
        assert all(made["tokenizer"].decode(encode(text)) == text for text in texts)
    return "loaded"


PROBES = ["TP53 promotes apoptosis.", "  two  spaces\n\n\tand α-synuclein 123", "naïve 😀 don't", "aaaa bbbb", "the the them", "\x00\x04~", "a<think>b"]


def tokenizer(directory, rng, made):
    """Its ids are those of the library, if that loads it too."""
    shutil.copytree(made["tokenizers"] / rng.choice(("assets", *STYLES)), directory, dirs_exist_ok=True)
    spoil_file(directory / rng.choice(("tokenizer.json",) * 9 + ("tokenizer_config.json",)), rng)
    ours, error = refusal(lambda: hf.load_tokenizer(directory), directory, UserError)
    if error:
        return "refused"
    try:
        theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        expected = [theirs.encode(text, add_special_tokens=False).ids for text in PROBES]
    except BaseException as e:                                            # its panics are no Exceptions
        if isinstance(e, TooLong):
            raise
        expected = None
    for i, text in enumerate(PROBES):
        ids = ours.encode(text)
        hf.load_chat_format(None, ours, "plain").encode([hf.Turn("user", text), hf.Turn("assistant", text)]) if ours.eos_id is not None else None
        special = any(t and t in text and not (ours.added and ours.added.fullmatch(t)) for t in ours.special)   # the library reads those
        assert expected is None or special or ids == expected[i], (text, ids, expected[i])
        assert all(0 <= n < ours.n_vocab for n in ids) and isinstance(ours.decode(ids), str)
    return "loaded"


def directory_of_a_model(directory, rng, made):
    """Its tensors are those of the library, and it computes."""
    shutil.copytree(made["models"] / rng.choice(("gpt2", "llama", "sharded", "qwen3")), directory, dirs_exist_ok=True)
    path = rng.choice(sorted(directory.iterdir()))
    spoil_file(path, rng)
    opened, error = refusal(lambda: hf.open_model(directory), directory, UserError)
    if opened:
        with torch.device("meta"):
            GPT(opened[1])
        generation, error = refusal(lambda: hf.generation_config(directory), directory, UserError)
        chat_format, error = refusal(lambda: hf.load_chat_format(None, opened[2], "plain"), directory, UserError)
        if chat_format:
            hf.stop_ids(opened[1], generation or {}, opened[2], chat_format)
    loaded, error = refusal(lambda: hf.load_model(directory), directory, ValueError, FileNotFoundError)
    if error:
        return "refused"
    for file in hf.weight_files(directory):
        ours, raw = load_safetensors(file), file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        head = json.dumps({k: v for k, v in json.loads(raw[8:end]).items() if k != "__metadata__"}).encode()   # which we do not read
        theirs = safetensors.torch.load(len(head).to_bytes(8, "little") + head + raw[end:])
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(t.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8)) for name, t in ours.items())
    with torch.no_grad():
        assert loaded.float()(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, loaded.config.vocab_size)
    return "loaded"


def adapter(directory, rng, made):
    """A model with it is saved with the numbers of the file."""
    name = rng.choice(sorted(made["adapters"]))
    model, source = hf.load_model(made["models"] / name), made["adapters"][name]
    shutil.copytree(source, directory, dirs_exist_ok=True)
    spoil_file(rng.choice(sorted(directory.iterdir())), rng)
    opened, error = refusal(lambda: hf.open_adapter(directory, model.config), directory, UserError)
    if error:
        return "refused"
    model.add_lora(opened.rank, opened.alpha)
    _, error = refusal(lambda: hf.fill_adapter(model, directory), directory, UserError)
    if error:
        return "refused"
    hf.save_adapter(model, directory / "again", None)
    again, before = (load_safetensors(path / "adapter_model.safetensors") for path in (directory / "again", directory))
    assert again.keys() == before.keys() and all(torch.equal(again[name], t.float()) for name, t in before.items())
    return "loaded"


def checkpoint(directory, rng, made):
    """What is loaded is what was saved, weights and moments, to the bit."""
    source, saved = made["checkpoint"]
    shutil.copytree(source, directory / "checkpoint")
    spoil_file(rng.choice(sorted(directory.rglob("step-3/*"))), rng)
    net = tiny(seed=1, vocab_size=len(SPECIAL))                           # another start than the saved one's
    trained, optimizer = dict(net.named_parameters()), torch.optim.AdamW(net.parameters())
    step, error = refusal(lambda: resume_from_checkpoint(directory, trained, optimizer, True, Ranks("cpu")), directory, UserError)
    if error:
        return "refused"
    assert step == 3 and all(torch.equal(t, u) for t, u in zip(tensors(trained, optimizer), saved, strict=True))
    return "loaded"


def tensors(trained, optimizer):
    return [t.detach().clone() for part in (trained, *optimizer.state_dict()["state"].values()) for t in part.values()]


def whole_run(directory, rng, made):
    """train.py starts, or goes on with, a run of which a file is spoilt, or one of its model or data: with exit code 0, or one line that
    says why not."""
    shutil.copytree(made["run"], directory, dirs_exist_ok=True)
    if rng.random() < 0.6:
        shutil.rmtree(directory / "out")
    spoil_file(rng.choice(sorted(p for p in directory.rglob("*") if p.is_file())), rng)
    code, out, err = train_in(directory)
    assert code == 0 and not err or code in (1, 2) and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1100, (code, err[:300])
    if code:
        return "refused"
    lines = [json.loads(line) for line in (directory / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and all(p.stat().st_size for p in (directory / "out" / "model").iterdir())
    contents = json.loads((directory / "out" / "config.json").read_text())["sha256"]
    if all(contents[key] == made["contents"][key] for key in ("init", "tokens")):   # then nothing else may have mattered
        assert (directory / "out" / "model" / "model.safetensors").read_bytes() == made["result"]
    return "loaded"


def train_in(directory):
    """(exit code, stdout, stderr) of train.py with the model and data in this directory, in this process."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["train.py", *f"--init {directory}/base --data {directory}/data.jsonl --steps 4 --batch-size 2 --save-every 2 --dtype float32 "
                f"--lora-rank 1 --device cpu --out {directory}/out".split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(train.main)
        except SystemExit as e:
            return e.code, out.getvalue(), err.getvalue()


def make(directory):
    """Whole inputs, to be spoilt."""
    made = {"tokenizer": hf.load_tokenizer(ASSETS), "tokenizers": directory / "tokenizers", "models": directory / "models", "adapters": {}}
    (made["tokenizers"] / "assets").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, made["tokenizers"] / "assets" / name)
    for style in STYLES:
        (made["tokenizers"] / style).mkdir()
        build(style, made["tokenizers"] / style, whole_alphabet=style != "gpt2", vocab_size=600)
    for name, change in (("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                     "original_max_position_embeddings": 64}}), ("sharded", {"tie_word_embeddings": False}),
                         ("gpt2", {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new"}), ("qwen3", {"architectures": ["Qwen3ForCausalLM"]})):
        limit = hf.weights.FILE_BYTES
        if name == "sharded":
            hf.weights.FILE_BYTES = 200_000
        save_with_tokenizer(tiny(vocab_size=made["tokenizer"].n_vocab, **change), made["models"] / name)
        hf.weights.FILE_BYTES = limit
        (made["models"] / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "temperature": 0.5}))
        (made["models"] / name / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("gpt2", "llama"):
        model = hf.load_model(made["models"] / name)
        model.add_lora(2, 3)
        for layer in model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.lora_b)
        made["adapters"][name] = directory / "adapters" / name
        hf.save_adapter(model, made["adapters"][name], name)
    net = tiny(vocab_size=len(SPECIAL))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.zeros(1, 5, dtype=torch.int64)).sum().backward()
    optimizer.step()
    (directory / "checkpoint").mkdir()
    save_checkpoint(directory, 3, dict(net.named_parameters()), optimizer, 1, Ranks("cpu"), "")
    run = made["run"] = directory / "run"
    shutil.copytree(made["models"] / "llama", run / "base")
    (run / "data.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    assert train_in(run)[0] == 0
    made["result"] = (run / "out" / "model" / "model.safetensors").read_bytes()
    made["contents"] = json.loads((run / "out" / "config.json").read_text())["sha256"]
    shutil.rmtree(run / "out" / "checkpoint" / "step-4")                  # it is to go on from step 2
    for part in ("model", "adapter"):
        shutil.rmtree(run / "out" / part)
    return {**made, "checkpoint": (directory / "checkpoint", tensors(dict(net.named_parameters()), optimizer))}


TARGETS = {"jsonl": jsonl, "tokenizer": tokenizer, "model": directory_of_a_model, "adapter": adapter, "checkpoint": checkpoint, "run": whole_run}


class TooLong(BaseException):
    """Nobody catches it."""


def too_long(*_):
    raise TooLong(f"more than {SECONDS} seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    tally, findings = collections.Counter(), 0
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as temporary:
        made = make(Path(temporary))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
        for number in range(args.first, args.first + args.count):
            target, directory = args.only[number % len(args.only)], Path(temporary) / "input"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            signal.alarm(SECONDS)
            try:
                tally[target, TARGETS[target](directory, random.Random(f"{args.seed} {number}"), made)] += 1
            except BaseException as e:                                    # whatever it is, it should not have come
                signal.alarm(0)
                if isinstance(e, KeyboardInterrupt):
                    raise
                findings += 1
                frame = e.__traceback__
                while frame.tb_next:
                    frame = frame.tb_next
                print(f"--seed {args.seed} --first {number} --only {' '.join(args.only)}: {target}: {e!r:.300} at "
                      f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}", flush=True)
            signal.alarm(0)
    print("; ".join(f"{target} {how} {n}" for (target, how), n in sorted(tally.items())) + f"; findings {findings}")
    raise SystemExit(findings > 0)


if __name__ == "__main__":
    main()
