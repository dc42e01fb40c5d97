"""Converts HuatuoGPT-sft-data-v1, Chinese consultations, to conversations.

    python prepare/huatuo.py HuatuoGPT_sft_data_v1.jsonl --out huatuo.jsonl

The input is the file of https://huggingface.co/datasets/FreedomIntelligence/HuatuoGPT-sft-data-v1 (Zhang et al., 2023,
arXiv 2305.15075): a line is {"data": ["问：...", "答：...", ...]}, question and answer in turn. A line of the output is
{"messages": [{"role": "user", "content"}, {"role": "assistant", "content"}, ...]}, without these marks. A last question
that nobody answers is left out, as its authors do.
"""

import collections
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))              # our modules are in the root
from runtime.files import write_whole  # noqa: E402
from runtime.process import Parser, UserError, run  # noqa: E402
from runtime.rows import read_rows  # noqa: E402


SPEAKERS = (("user", "问"), ("assistant", "答"))


def as_messages(texts):
    """The messages of a list of texts, the marks of its speakers removed; None if they do not follow in turn."""
    messages = []
    for number, text in enumerate(texts):
        role, mark = SPEAKERS[number % 2]
        if text[:2] not in (f"{mark}：", f"{mark}:") or not text[2:].strip():
            return None
        messages.append({"role": role, "content": text[2:].strip()})
    return messages


def read_conversations(path):
    """(rows, {reason: how many were left out}). Raises UserError."""
    rows, left_out = [], collections.Counter()
    for row in read_rows(path):
        texts = row.content.get("data")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{row.where}: no list of texts under 'data'; expected a line of HuatuoGPT-sft-data-v1")
        if len(texts) % 2:
            left_out["last questions without an answer"] += 1
            texts = texts[:-1]
        messages = as_messages(texts)
        if messages:
            rows.append({"messages": messages})
        else:
            left_out["conversations that are not 问 and 答 in turn"] += 1
    return rows, left_out


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="HuatuoGPT_sft_data_v1.jsonl")
    parser.add_argument("--out", required=True, help="the file to write")
    args = parser.parse_args()
    rows, left_out = read_conversations(args.file)
    if not rows:
        raise UserError(f"{args.file}: no conversation; expected HuatuoGPT-sft-data-v1")
    write_whole(Path(args.out), [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows])
    print(f"{args.out}: {len(rows)} conversations; left out: "
          + (", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "nothing"))


if __name__ == "__main__":
    run(main)
