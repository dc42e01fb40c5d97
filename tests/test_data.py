"""Rows, samples, their order, and packing."""

import gzip
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from forked import forked
from support import ASSETS, ROOT
from tokenizer_files import assets_with

import data
import hf
from runtime.process import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(ASSETS)


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def marked(sample, tokenizer):
    """(prompt parts, response parts) decoded, from the mask."""
    return (tokenizer.decode(sample.ids[~sample.response]), tokenizer.decode(sample.ids[sample.response]))


def test_every_shape_marks_its_response(tmp_path, tokenizer):
    end = "<|endoftext|>"
    path = write(
        tmp_path / "a.jsonl", {"prompt": "What?", "response": "That.", "group": "g", "extra": 1},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"},
                      {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"},
                      {"role": "assistant", "content": "D."}]},
        {"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Add.", "input": None, "output": "3"},
        {"text": "Just text."})
    samples, counts = data.load_samples(path, tokenizer)
    assert counts == {"samples": 5, "cut": 0, "dropped": 0, "unread": "'extra' (1)", "warnings": []}
    assert [marked(s, tokenizer) for s in samples[:4]] == [
        ("What?\n", "That." + end), ("Be brief.\nA?\nC?\n", f"B.{end}D.{end}"), ("Add.\n1 2\n", "3" + end),
        ("Add.\n", "3" + end)]
    assert samples[0].group == "g" and samples[0].line == 1 and samples[0].where == f"{path}:1"
    text = samples[4]
    assert tokenizer.decode(text.ids) == "Just text." + end and text.response.tolist() == [False] + [True] * (len(text.ids) - 1)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    again, _ = data.load_samples(packed, tokenizer)
    assert all((a.ids == b.ids).all() for a, b in zip(samples, again))


def encode(tokenizer, *turns):
    """The Sample of a conversation."""
    messages = [{"role": role, "content": text} for role, text in turns]
    samples, _ = data.load_samples("here", tokenizer, rows=[(1, {"messages": messages})])
    return samples[0]


def test_prompt_and_response_are_encoded_separately(tokenizer):
    sample = encode(tokenizer, ("user", "x"), ("assistant", " y"))
    assert sample.ids.tolist() == [*tokenizer.encode("x"), *tokenizer.encode("\n"), *tokenizer.encode(" y"), tokenizer.eos_id]


def test_long_samples_are_cut_at_the_end_and_dropped_when_nothing_is_left(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "response": "b c d e f g h i j k"}, {"prompt": "long " * 50, "response": "x"},
                 {"prompt": "a", "response": "b"})
    samples, counts = data.load_samples(path, tokenizer, max_length=8)
    assert counts == {"samples": 2, "cut": 2, "dropped": 1, "unread": "none", "warnings": []}
    assert [len(s.ids) for s in samples] == [8, 4] and [s.line for s in samples] == [1, 3]
    with pytest.raises(UserError, match="within 2 tokens"):
        data.load_samples(path, tokenizer, max_length=2)


BAD_LINES = {
    "not JSON": ('{"prompt": "a", "resp', "not JSON"),
    "a list": ("[1, 2]", "list"),
    "wrong keys": ('{"question": "a", "reply": "b"}', "'question', 'reply'"),
    "no response": ('{"prompt": "a"}', "the keys are 'prompt'; expected"),
    "wrong type": ('{"prompt": "a", "response": 3}', "'response' is int"),
    "empty response": ('{"prompt": "a", "response": ""}', "empty"),
    "blank response": ('{"instruction": "a", "output": " \\n"}', "blank"),
    "blank text": ('{"text": "  "}', "blank"),
    "not UTF-8": (b'{"prompt": "a", "response": "\xff"}', "not UTF-8"),
    "no assistant": ('{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
    "unknown role": ('{"messages": [{"role": "tool", "content": "a"}]}', "'tool'"),
    "messages no list": ('{"messages": "a"}', "list"),
    "content no string": ('{"messages": [{"role": "assistant", "content": ["a"]}]}', "'content' is list"),
    "NUL byte": (b'{"prompt": "a", "response": "b\0"}', "not JSON: Invalid control character"),
    "zeros": (b"\0" * 512, "not JSON"),                                   # what a crash leaves where a file was growing
    "half a character": (r'{"prompt": "a \ud83d b", "response": "c"}', r"'\ud83d' is half a character"),
    "half a character elsewhere": (r'{"prompt": "a", "response": "c", "group": "\uDFFF"}', r"'\udfff' is half a character"),
    "nested deeply": ('{"prompt": "a", "response": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON: maximum recursion depth"),
    "a number without end": ('{"prompt": "a", "response": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
    "two objects": ('{"text": "a"}{"text": "b"}', "not JSON: Extra data"),
    "an old Mac's lines": ('{"text": "a"}\r{"text": "b"}', "not JSON: Extra data"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "a mark in the middle": ('{"text": \ufeff"a"}', "not JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_file_and_number(case, tmp_path, tokenizer):
    line, words = BAD_LINES[case]
    path = tmp_path / "bad.jsonl"
    good = b'{"prompt": "a", "response": "b"}\n\n'
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(UserError) as error:
        data.load_samples(path, tokenizer)
    assert f"{path}:3: " in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_bad_files(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("\n")
    whole = gzip.compress(b"".join(b'{"prompt": "%d", "response": "b"}\n' % i for i in range(1000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "damaged.jsonl.gz").write_bytes(whole[:200] + bytes(b ^ 0xFF for b in whole[200:230]) + whole[230:])
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip")
    for name, words in (("missing.jsonl", "no such file"), ("empty.jsonl", "empty"), ("cut.jsonl.gz", "cannot be read"),
                        ("damaged.jsonl.gz", "cannot be read"), ("no.jsonl.gz", "cannot be read")):
        with pytest.raises(UserError, match=words):
            data.load_samples(tmp_path / name, tokenizer)


def test_marks_and_line_ends_of_windows_change_nothing(tmp_path, tokenizer):
    rows = [{"prompt": "What?", "response": "α\r\nβ 😀"}, {"text": "b"}]
    lines = [json.dumps(row).encode() for row in rows]                    # (the character beyond U+FFFF as two halves, in order)
    expected = None
    for content in (b"\n".join(lines), b"\r\n".join(lines) + b"\r\n\r\n", b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n",
                    b"".join(b"\xef\xbb\xbf" + line + b"\r\n" for line in lines) + b"\xef\xbb\xbf"):
        (tmp_path / "a.jsonl").write_bytes(content)
        samples, counts = data.load_samples(tmp_path / "a.jsonl", tokenizer)
        assert counts["samples"] == 2 and marked(samples[0], tokenizer) == ("What?\n", "α\r\nβ 😀<|endoftext|>")
        expected = expected or [s.ids.tolist() for s in samples]
        assert [s.ids.tolist() for s in samples] == expected


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, tokenizer):
    with open(tmp_path / "a.jsonl", "wb") as f:
        f.write(b'{"text": "a"}\n{"text": "')
        for _ in range(100):
            f.write(b"x" * 1_000_000)
        f.write(b'"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes(), 1))
    for name in ("a.jsonl", "b.jsonl.gz"):
        tracemalloc.start()
        with pytest.raises(UserError, match=rf"{name}:2: a line of more than 16 MiB; expected one JSON object a line"):
            data.load_samples(tmp_path / name, tokenizer)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
        tracemalloc.stop()


@pytest.mark.parametrize("piece, where, words", [
    (b"\n", 100_002, "more than 100000 blank lines in a row"), (b" \t\r\n", 100_002, "more than 100000 blank lines in a row"),
    (b"\xef\xbb\xbf\n", 100_002, "more than 100000 blank lines in a row"), (b" ", 2, "a line of more than 16 MiB"),
    (b"\0", 2, "a line of more than 16 MiB"), (b"[[", 2, "a line of more than 16 MiB")])
def test_what_has_no_end_is_refused_before_it_is_read(piece, where, words, tmp_path, tokenizer):
    """60 MB and more in a file of some kB."""
    content = b'{"text": "a"}\n' + piece * (60_000_000 // len(piece)) + b'{"text": "a"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, 1))
    del content
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"a\.jsonl\.gz:{where}: {words}; expected one JSON object a line"):
        data.load_samples(tmp_path / "a.jsonl.gz", tokenizer)
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


def test_blank_lines_between_rows_are_no_matter(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes((b"\n" * 60_000 + b'{"text": "a"}\n') * 3 + b"\n" * 60_000)
    samples, _ = data.load_samples(tmp_path / "a.jsonl", tokenizer)
    assert [sample.line for sample in samples] == [60_001, 120_002, 180_003]


@pytest.mark.parametrize("name", ["plain", "own"])
def test_what_is_cut_off_is_not_kept(name, tmp_path, tokenizer):
    """Of 12 rows of 100 kB 8 tokens each stay, whatever shape they have; a key that nobody reads is not kept either."""
    text = "word " * 20_000
    rows = [{"prompt": "a", "response": text}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]},
            {"prompt": "a", "response": "b c d e f g h i j", "extra": text}]
    path = write(tmp_path / "a.jsonl", *[{**row, "group": "g"} for row in rows * 4])
    if name == "own":
        template = "{% for m in messages %}{{ m.content }}{{ '<|endoftext|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
        (assets_with(tmp_path, []) / "chat_template.jinja").write_text(template)
        tokenizer = hf.load_tokenizer(tmp_path)
    chat_format = hf.load_chat_format(None, tokenizer)
    data.load_samples(path, tokenizer, chat_format, max_length=8)         # whatever is kept for later, is kept now
    tracemalloc.start()
    samples, counts = data.load_samples(path, tokenizer, chat_format, max_length=8)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert chat_format.name == name and counts["cut"] == 12 and samples.lengths.tolist() == [8] * 12
    assert kept < 100_000


def test_the_order_depends_on_seed_and_epoch_alone():
    n, batch = 10, 4
    steps = [data.global_batch(step, n, batch, seed=5) for step in range(6)]
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1]
    assert [len(b) for _, b in steps] == [4, 4, 2] * 2                    # the last partial batch is kept
    first, second = (sum((b for e, b in steps if e == epoch), []) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    other = sum((data.global_batch(step, n, 5, seed=5)[1] for step in range(2)), [])
    assert other == first                                                 # the batch size only cuts the same order
    assert data.global_batch(0, n, batch, seed=6)[1] != first[:4]
    assert first == [5, 1, 7, 3, 4, 6, 8, 9, 2, 0]                        # on every machine, in every version of numpy


def test_the_order_is_drawn_once_an_epoch(monkeypatch):
    draws, draw = [], data.np.random.RandomState
    monkeypatch.setattr(data.np.random, "RandomState", lambda seed: draws.append(seed) or draw(seed))
    data.order_of_epoch.cache_clear()
    for step in range(9):
        data.global_batch(step, 10, 4, seed=5)
    assert draws == [[5, 0], [5, 1], [5, 2]]


def test_a_batch_goes_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    batch, pinned, moved = data.collate([]), [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: moved.append((tensor, device, non_blocking)) or tensor)
    gpu = torch.device("cuda")
    there = batch.to(gpu)
    assert [id(x) for x in pinned] == [id(x) for x in (batch.input_ids, batch.at, batch.targets, batch.offsets)]
    assert [id(x) for x, *_ in moved] == [id(x) for x in (there.input_ids, there.at, there.targets)]
    assert {(device, non_blocking) for _, device, non_blocking in moved} == {(gpu, True)}
    assert there.offsets is not batch.offsets                             # the pinned copy


def test_dealing_keeps_every_sample_and_every_limit():
    rng = np.random.RandomState(0)
    for _ in range(200):
        lengths = rng.randint(1, 120, size=rng.randint(1, 40)).tolist()
        world, limit = int(rng.randint(1, 9)), int(rng.choice([1, 64, 128, 1000]))
        plan = data.deal(lengths, world, limit)
        assert sorted(i for rank in plan for micro in rank for i in micro) == list(range(len(lengths)))
        assert len(plan) == world and len({len(rank) for rank in plan}) == 1          # equal backward passes: no hang
        for micro in (m for rank in plan for m in rank):
            assert len(micro) <= 1 or sum(lengths[i] for i in micro) <= limit
        loads = [sum(lengths[i] for m in rank for i in m) for rank in plan]
        assert max(loads) - min(loads) <= max(lengths)
        assert plan == data.deal(lengths, world, limit)


def first_fit(lengths, world, micro_tokens):
    """What `data.deal` says that it does, by looking at every micro-batch for every sample."""
    plan, loads = [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = loads.index(min(loads))
        loads[rank] += lengths[i]
        for micro_batch in plan[rank]:
            if sum(lengths[j] for j in micro_batch) + lengths[i] <= micro_tokens:
                micro_batch.append(i)
                break
        else:
            plan[rank].append([i])
    most = max(map(len, plan))
    return [micro_batches + [[]] * (most - len(micro_batches)) for micro_batches in plan]


def test_samples_go_to_the_first_micro_batch_with_room():
    rng = np.random.RandomState(1)
    for _ in range(1000):
        lengths = rng.randint(1, rng.choice([3, 20, 120]), size=rng.randint(0, 60)).tolist()
        world, micro_tokens = int(rng.randint(1, 9)), int(rng.choice([1, 7, 64, 128, 1000]))
        assert data.deal(lengths, world, micro_tokens) == first_fit(lengths, world, micro_tokens)


class Length(int):
    """Counts how often a length is compared with what is left somewhere."""
    compared = 0

    def __lt__(self, other):
        Length.compared += 1
        return int(self) < other

    def __le__(self, other):
        Length.compared += 1
        return int(self) <= other

    __gt__, __ge__ = (lambda self, other: not self <= other), (lambda self, other: not self < other)


@pytest.mark.parametrize("world", [1, 8])
def test_dealing_many_samples_looks_at_few_micro_batches_for_each(world, monkeypatch):
    """With 3,000 micro-batches and more; each sample is compared a few times with one, and is sorted by Python."""
    lengths = [Length(length) for length in np.random.RandomState(2).randint(20, 2000, size=30_000)]
    monkeypatch.setattr(Length, "compared", 0)
    plan = data.deal(lengths, world, 8192)
    assert sum(map(len, plan)) > 3000 and Length.compared < 50 * len(lengths)


def test_collate_lays_samples_end_to_end(tokenizer):
    samples = [encode(tokenizer, ("user", "ab"), ("assistant", "c")),
               encode(tokenizer, ("user", "d"), ("assistant", "e f"), ("user", "g"), ("assistant", "h"))]
    batch = data.collate(samples)
    ids = np.concatenate([s.ids for s in samples])
    assert batch.input_ids.tolist() == ids.tolist()
    assert batch.lengths == [len(s.ids) for s in samples]
    assert batch.targets.tolist() == ids[np.concatenate([s.response for s in samples])].tolist()
    assert batch.input_ids[batch.at + 1].tolist() == batch.targets.tolist()
    assert batch.offsets.tolist() == [0, 2, 2 + samples[1].response.sum()]
    empty = data.collate([])
    assert len(empty.input_ids) == 1 and len(empty.at) == 0 and empty.offsets.tolist() == [0]
    assert batch.offsets.dtype == empty.offsets.dtype == torch.int64
    for some, size in ((samples, 100), (samples, 5), ([], 40)):           # filled up with what is nobody's response
        filled, real = data.collate(some, size), data.collate(some)
        kept = sum(len(s.ids) for s in some)
        assert len(filled.input_ids) == sum(filled.lengths) == max(size, kept)
        assert filled.lengths[:len(some)] == [len(s.ids) for s in some] and max(filled.lengths) <= max([16, *batch.lengths])
        assert filled.input_ids[:kept].tolist() == real.input_ids[:kept].tolist()
        assert all(torch.equal(getattr(filled, k), getattr(real, k)) for k in ("at", "targets", "offsets"))


def test_micro_batches_are_full_where_lengths_are_like_medquads():
    rng = np.random.RandomState(0)
    for _ in range(20):                                                   # quartiles 116, 196, 342; 95% below 801 tokens
        lengths = np.exp(rng.normal(5.28, 0.8, size=512)).clip(20, 2048).astype(int).tolist()
        for micro_tokens in (2048, 4096, 8192):
            sizes = [sum(lengths[i] for i in micro) for micro in data.deal(lengths, 1, micro_tokens)[0]]
            assert len(sizes) == -(-sum(lengths) // micro_tokens)         # no packing has fewer: the last holds what is left
            assert sum(sizes[:-1]) >= 0.99 * micro_tokens * len(sizes[:-1])


def test_sizes_that_are_compiled_are_few():
    assert [data.bucket(n, 1000) for n in (0, 1, 250, 251, 750, 751, 1000, 1001, 9000)] == \
        [250, 250, 250, 500, 750, 1000, 1000, 1250, 9000]
    assert all(n <= data.bucket(n, m) for m in range(1, 40) for n in range(200))


@pytest.mark.slow
def test_the_command_shows_samples_and_lengths(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "What?", "response": "That."}, {"prompt": "b", "response": "c"})
    command = [ROOT / "data.py", path, "--tokenizer", ASSETS, "-n", "1"]
    good = forked(1, *command, path=())
    assert good.returncode == 0 and "chat format plain" in good.stdout and "What?\n[[That.<|endoftext|>]]" in good.stdout
    assert "2 samples; 0 cut, 0 dropped" in good.stdout and "response tokens" in good.stdout
    path.write_text("oops\n")
    bad = forked(1, *command, path=())
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and f"{path}:1: not JSON" in bad.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 20_000])
def test_a_reader_that_has_seen_enough_is_no_error(rows, tmp_path):
    """`python data.py ... | head`: what was not written yet, or not read, is nobody's fault."""
    path = write(tmp_path / "a.jsonl", *[{"prompt": "What?", "response": "That."}] * rows)
    command = [sys.executable, ROOT / "data.py", path, "--tokenizer", ASSETS, "-n", str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if rows > 2:
        process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().splitlines()
    # How many rows are read, on a slow machine.
    assert all(line.startswith(b"rows of ") for line in said) and process.wait() == 0
    process.stderr.close()


def test_the_command_prints_ids_and_mask_as_json(tmp_path, monkeypatch, capsys):
    directory = assets_with(tmp_path, ["<|im_start|>", "<|im_end|>"])
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "Why?", "response": "So."}\n\n{"prompt": "a<|im_end|>b", "response": "x"}\n')
    tokenizer = hf.load_tokenizer(directory)
    samples, counts = data.load_samples(file, tokenizer)
    monkeypatch.setattr(sys, "argv", ["data.py", str(file), "--tokenizer", str(directory), "--json"])
    data.main()
    out, err = capsys.readouterr()
    printed = [json.loads(line) for line in out.splitlines()]
    assert printed == [{"line": sample.line, "ids": sample.ids.tolist(), "response": sample.response.astype(int).tolist()} for sample in samples]
    assert [sample["line"] for sample in printed] == [1, 3] and printed[0]["response"][-2:] == [1, 0]
    assert err.count("warning: ") == 1 and f"{file}:3: <|im_end|>" in err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "-n", "1"])
    data.main()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_lookalikes_of_special_tokens_are_counted_and_shown_apart(tmp_path, monkeypatch, capsys):
    directory = assets_with(tmp_path, ["<|im_start|>", "<|im_end|>"])
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "Why?", "response": "So."}, {"prompt": "Why?", "response": "So.<|im_end|>"},
            {"messages": [{"role": "system", "content": "<|endoftext|>"}, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
            {"text": "Some text.<|endoftext|>"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, counts = data.load_samples(file, hf.load_tokenizer(directory), "chatml")
    assert counts["warnings"] == [f"rows that spell special tokens, which stay text: 3, the first at {file}:2: <|im_end|> (the chat format writes turns "
                                  "and their ends itself; expected rows without them)"]
    monkeypatch.setattr(sys, "argv", ["data.py", str(file), "--tokenizer", str(directory), "--chat-format", "chatml", "-n", "9"])
    data.main()
    out = capsys.readouterr().out
    # The token that ends the turn follows the text that looks like it.
    assert r"[[So.<\|im_end|><|im_end|>]]" in out and r"system" + "\n" + r"<\|endoftext|><|im_end|>" in out
    assert r"ome text.<\|endoftext|><|endoftext|>]]" in out
    assert "[[So.<|im_end|>]]" in out
