"""What assets/ promises, and prepare/go_facts.py on an ontology small enough to check by eye."""

import collections
import json
import subprocess
import sys

import pytest
from support import ASSETS, ROOT

from data import load_samples
from hf import load_tokenizer


sys.path.insert(0, str(ROOT / "prepare"))
import go_facts  # noqa: E402


@pytest.fixture(params=["", "continuum"])
def folder(request):
    return ASSETS / request.param


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_size(folder):
    assert sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) <= 1_000_000
    assert 380 <= len(rows(folder, "facts")) <= 500


@pytest.mark.slow
def test_strata_are_by_gene_and_exposures_are_as_stated(folder):
    stratum, pretrained, finetuned = {}, collections.Counter(), collections.Counter()
    for f in rows(folder, "facts"):
        for gene in f["subject"].replace(" and ", ", ").split(", "):
            assert stratum.setdefault(gene, f["fact"]) == f["fact"]       # a gene belongs to one fact
    texts = [" " + r["text"].replace("\n", " ") for r in rows(folder, "pretrain")]
    for r in rows(folder, "finetune"):
        finetuned[r["fact"]] += 1
    for f in rows(folder, "facts"):
        mentions = [t for t in texts if f" {f['subject']} " in t or f" {f['subject']}." in t or f" {f['subject']}?" in t
                    or f" {f['subject']}:" in t or f" {f['subject']}," in t]
        assert all(f["answer"] in t for t in mentions)                    # nothing but the sourced answer
        pretrained[f["fact"]] = len(mentions)
    for f in rows(folder, "facts"):
        wordings = 18 if f["stratum"] in ("known", "known, held out", "planted") else int(f["stratum"].startswith("weak"))
        if f["stratum"].startswith("told "):
            wordings = int(f["stratum"].removeprefix("told ").split("x")[0])
        # What is told in all wordings is also explained once.
        assert pretrained[f["fact"]] == wordings + (wordings == 18), f
        assert finetuned[f["fact"]] == (0 if "held out" in f["stratum"] else 2)


def test_fine_tuning_answers_are_explanations_with_the_fact_inside(folder):
    samples, _ = load_samples(folder / "finetune.jsonl", load_tokenizer(folder))
    assert all(30 <= s.response.sum() <= 120 for s in samples)
    answer = {f["fact"]: f["answer"] for f in rows(folder, "facts")}
    assert all(answer[r["fact"]] in r["response"] and r["subject"] in r["response"] for r in rows(folder, "finetune"))


def test_choice_items_are_balanced_and_worded_like_no_training_text(folder):
    texts = [r["text"] for r in rows(folder, "pretrain")] + [r["prompt"] + "\n" + r["response"] for r in rows(folder, "finetune")]
    items, facts = rows(folder, "choice"), {f["fact"]: f for f in rows(folder, "facts")}
    assert {i["fact"] for i in items} == set(facts)
    quads = collections.defaultdict(list)
    for i in items:
        f = facts[i["fact"]]
        assert i["choices"][i["answer"]] == f["answer"] and i["group"] == f["stratum"]
        assert len(set(i["choices"])) == 4
        prompt = i["question"][i["question"].index(f["subject"]):] + "\nAnswer:"
        assert not any(prompt in t or i["question"] in t for t in texts)  # nor its part from the gene to the answer
        quads[i["quad"]].append(i)
    for quad in quads.values():                                           # each answer right once, in each place once
        assert sorted(i["answer"] for i in quad) == [0, 1, 2, 3]
        assert len({facts[i["fact"]]["kind"] for i in quad}) == 1
        assert sorted(i["choices"][i["answer"]] for i in quad) == sorted(quad[0]["choices"])


OBO = """format-version: 1.2
data-version: test
[Term]
id: GO:1
name: eating
namespace: biological_process
is_a: GO:9 ! living
[Term]
id: GO:2
name: sleeping
namespace: biological_process
is_a: GO:9 ! living
[Term]
id: GO:3
name: positive regulation of eating
namespace: biological_process
relationship: part_of GO:2 ! sleeping
[Term]
id: GO:4
name: negative regulation of eating
namespace: biological_process
[Term]
id: GO:5
name: gone forever
namespace: biological_process
is_a: GO:9
is_obsolete: true
[Term]
id: GO:6
name: protein-containing complex
namespace: cellular_component
[Term]
id: GO:7
name: eating complex
namespace: cellular_component
is_a: GO:6
[Term]
id: GO:8
name: kitchen
namespace: cellular_component
is_a: GO:6x
[Term]
id: GO:6x
name: part of the house
namespace: cellular_component
[Term]
id: GO:9
name: living
namespace: biological_process
[Typedef]
id: part_of
name: part of
"""
# gene, qualifier, term, evidence code
ANNOTATIONS = [("AAA", "", "GO:1", "IDA"), ("BBB", "involved_in", "GO:1", "IEA"), ("CCC", "NOT", "GO:1", "IDA"),
               ("CCC", "", "GO:1", "IMP"), ("DDD", "", "GO:3", "IMP"), ("EEE", "", "GO:3", "IMP"), ("EEE", "", "GO:4", "TAS"),
               ("FFF", "NOT|involved_in", "GO:9", "IDA"), ("FFF", "", "GO:1", "IDA"), ("GGG", "", "GO:5", "IDA"),
               ("HHH", "acts_upstream_of", "GO:1", "IDA"), ("III", "", "GO:1", "IEP"), ("III", "", "GO:1", "IDA"),
               ("JJJ", "part_of", "GO:7", "IDA"), ("KKK", "located_in", "GO:8", "IDA")]


def test_only_experimental_uncontradicted_facts_survive(tmp_path):
    (tmp_path / "go.obo").write_text(OBO)
    (tmp_path / "go.gaf").write_text("!gaf-version: 2.2\n" + "".join(
        f"UniProtKB\tP\t{gene}\t{q}\t{term}\tPMID:1\t{code}\t\tP\t\t\tprotein\ttaxon:9606\t20190101\tX\t\t\n"
        for gene, q, term, code in ANNOTATIONS)
        + "UniProtKB\tP\tLLL\t\tGO:1\tGO_REF:1\tIDA\t\tP\t\t\tprotein\ttaxon:9606\t20190101\tX\t\t\n")
    onto = go_facts.Ontology(tmp_path / "go.obo", tmp_path / "go.gaf")
    assert onto.ancestors("GO:3") == {"GO:3", "GO:2", "GO:9"} and "GO:5" not in onto.terms
    # BBB no experiment, CCC and FFF negated (FFF above the term), GGG obsolete, HHH only upstream; EEE both directions
    assert onto.facts("process") == {"GO:1": ["AAA", "III"]}
    assert onto.facts("promotes") == {"GO:3": ["DDD"]} and onto.facts("restrains") == {}
    assert onto.evidence["III", "GO:1"] == "IDA" and ("LLL", "GO:1") not in onto.evidence
    assert onto.annotated["LLL"] == {"GO:1", "GO:9"}                      # other annotations still say what is annotated
    assert onto.facts("location") == {"GO:8": ["KKK"]}                    # not the complex
    # who promotes eating is not offered 'eating' nor either direction of it as a wrong answer
    assert onto.relatives("GO:3", "promotes") == {"GO:1", "GO:3", "GO:4"}


def test_too_little_data_is_said(tmp_path):
    (tmp_path / "go.obo").write_text(OBO)
    (tmp_path / "go.gaf").write_text("")
    command = [sys.executable, ROOT / "prepare" / "go_facts.py", "--obo", tmp_path / "go.obo", "--out", tmp_path / "out", "--gaf"]
    for gaf, words in (("go.gaf", "too few facts"), ("missing.gaf", "no such file")):
        result = subprocess.run([*command, tmp_path / gaf], capture_output=True, text=True)
        assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
