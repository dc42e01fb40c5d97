"""The scripts of prepare/ on tests/prepare/medquad (invented pages) and on rows in the published formats."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import hf
from hf.conversation import as_conversation
from runtime.process import UserError
from runtime.rows import read_jsonl
from tasks.choice import load_choice
from tasks.items import load_items


ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "tests" / "prepare" / "medquad"
sys.path.insert(0, str(ROOT / "prepare"))
import choice  # noqa: E402
import gene_labels  # noqa: E402
import genesets  # noqa: E402
import medquad  # noqa: E402


def call(main, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    main()


def rows(path):
    return [row for _, row in read_jsonl(path)]


def test_medquad_rows(tmp_path, monkeypatch, capsys):
    call(medquad.main, monkeypatch, PAGES, "--out", tmp_path / "new" / "dir", "--val", 1)
    train, val = (rows(tmp_path / "new" / "dir" / f"medquad_{name}.jsonl") for name in ("train", "val"))
    assert {p.name for p in (tmp_path / "new" / "dir").iterdir()} == {"medquad_train.jsonl", "medquad_val.jsonl"}
    got = {r["prompt"]: r for r in train + val}
    assert got["What is (are) Blue Thumb ?"] == {
        "prompt": "What is (are) Blue Thumb ?", "focus": "Blue Thumb", "qtype": "information", "source": "1_CancerGov_QA",
        "response": "Key Points - The thumb is blue. - It hums at < 20 °C & stops above."}
    assert len(train + val) == 6 and len(got) == 5                        # the repeated pair once, Green ear not at all
    assert [(r["focus"], r["response"]) for r in train + val if r["qtype"] == "treatment"].count(("Blue Thumb", "Soap.")) == 1
    assert {r["response"] for r in train + val if r["prompt"] == "What are the treatments for Loud knee ?"} == {"Soap.", "Silence."}
    assert "left out: 2 pairs without an answer, 1 duplicates\n" in capsys.readouterr().out
    for r in train + val:
        assert as_conversation(r, "here") == [hf.Turn("user", r["prompt"]), hf.Turn("assistant", r["response"])]
    samples, counts = data.load_samples(tmp_path / "new" / "dir" / "medquad_train.jsonl", hf.load_tokenizer(ROOT / "assets"))
    assert counts.pop("unread").startswith("'focus' (")
    assert counts == {"samples": len(train), "cut": 0, "dropped": 0, "warnings": []}


def test_medquad_splits_by_focus_whatever_the_case_and_the_order_of_files(tmp_path, monkeypatch):
    found, left_out = medquad.read_pairs(PAGES)
    firsts = set()
    for seed in range(8):
        train, val = medquad.split(found, 1, seed)
        assert sorted(map(str, train + val)) == sorted(map(str, found))
        assert not {r["focus"].lower() for r in train} & {r["focus"].lower() for r in val}
        assert {r["focus"] for r in val} in ({"Blue Thumb", "blue thumb"}, {"Loud knee"})       # whole, and no more than needed
        firsts.add(val[0]["focus"])
    assert len(firsts) == 2                                               # the seed matters
    many = [{"focus": f"F{i % 40}", "i": i} for i in range(120)]
    assert [len(medquad.split(many, n, 0)[1]) for n in (1, 3, 4, 117)] == [3, 3, 6, 117]
    assert {r["focus"] for r in medquad.split(many, 30, 0)[1]} == {f"F{i}" for i in (6, 14, 25, 26, 28, 30, 32, 35, 37, 39)}    # on every machine
    listing = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(sorted(listing(self, pattern))))
    assert medquad.read_pairs(PAGES) == (found, left_out)


@pytest.mark.parametrize("page, counted", [
    ("<doc><qaPairs><pair><question>q</question><answer>a</answer></pair></qaPairs></doc>", "files without a QAPair"),
    ("<Document><Focus> </Focus><QAPairs><QAPair><Question qtype='x'>q</Question><Answer>a</Answer></QAPair></QAPairs></Document>", "pairs without a question or a focus"),
    ("<Document><Focus>F</Focus><QAPairs><QAPair><Answer>a</Answer></QAPair></QAPairs></Document>", "pairs without a question or a focus"),
    ("<Document><Focus>F</Focus><QAPairs><QAPair><Question>q</Question><Answer> \n </Answer></QAPair></QAPairs></Document>", "pairs without an answer")])
def test_medquad_counts_what_it_leaves_out(tmp_path, page, counted):
    shutil.copytree(PAGES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "0.xml").write_text(page)
    (before, base), (after, left_out) = medquad.read_pairs(PAGES), medquad.read_pairs(tmp_path)
    assert after == before and left_out[counted] == base[counted] + 1


def test_medquad_errors(tmp_path, monkeypatch):
    copy = shutil.copytree(PAGES, tmp_path / "copy")
    for args, words in (((tmp_path / "nowhere",), "nowhere: no such directory"), ((PAGES, "--val", 6), "sends 6 of 6 pairs"),
                        ((PAGES, "--val", 0), "sends 0 of 6"), ((PAGES / "10_MPlus_ADAM_QA",), "sends 0 of 0"),
                        ((PAGES, "--val", "many"), "invalid int")):
        with pytest.raises(UserError, match=words):
            call(medquad.main, monkeypatch, *args, "--out", tmp_path / "out")
    for text, words in (("<Document><Focus>", "bad.xml: not XML"), ("<?xml version='1.0' encoding='none'?><a/>", "bad.xml: not XML")):
        (copy / "3_GHR_QA" / "bad.xml").write_text(text)
        with pytest.raises(UserError, match=words):
            call(medquad.main, monkeypatch, copy, "--val", 1, "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no QAPair in 0 XML files"):
        medquad.read_pairs(tmp_path / "empty")
    assert not (tmp_path / "out").exists()                                # nothing is written before all is known to be right
    with pytest.raises(UserError, match="cannot be written: "):
        call(medquad.main, monkeypatch, PAGES, "--val", 1, "--out", copy / "3_GHR_QA" / "bad.xml")


PUBMED = {"11": {"QUESTION": "Does it?", "CONTEXTS": ["We asked.", "It did \u2265 once."], "LABELS": ["A", "B"], "MESHES": [], "final_decision": "maybe", "LONG_ANSWER": "Perhaps."},
          "12": {"QUESTION": "Will it?", "CONTEXTS": ["We waited."], "LABELS": ["A"], "MESHES": [], "final_decision": "no", "LONG_ANSWER": "No."}}
MCQ = {"question": "Which? ", "exp": None, "opa": "one", "opb": "two", "opc": 0.03, "opd": "four", "subject_name": "Counting", "topic_name": None, "id": "u-1", "choice_type": "single"}
USMLE = {"question": "What now?", "answer": "Wait", "options": {"B": "Wait", "A": "Cut", "D": "Ask", "C": "Run"}, "meta_info": "step1", "answer_idx": "B"}


def convert(kind, tmp_path, monkeypatch, lines, *more):
    """Through the command line and load_choice: the items without what load_choice adds."""
    source = tmp_path / "source"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    call(choice.main, monkeypatch, kind, source, "--out", tmp_path / "out.jsonl", *more)
    return [{k: v for k, v in item.items() if k not in ("line", "where") and v is not None} for item in load_choice(tmp_path / "out.jsonl")]


def test_pubmedqa(tmp_path, monkeypatch, capsys):
    first, second = convert("pubmedqa", tmp_path, monkeypatch, [PUBMED])
    assert first == {"question": "Does it?", "context": "We asked.\nIt did ≥ once.", "choices": ["yes", "no", "maybe"], "answer": 2, "id": "11"}
    ids = tmp_path / "ids"
    ids.write_text('{"12": "no"}')
    assert convert("pubmedqa", tmp_path, monkeypatch, [PUBMED], "--ids", ids) == [second] and second["answer"] == 1
    assert "1 of 2 items" in capsys.readouterr().out
    for named, words in (({"12": "yes"}, "ids: id 12 is 'yes'; expected 'no'"), ({"12": None}, "id 12 is None"), ({"13": "yes"}, "id 13 is not in .*source"), ([], "ids: expected one JSON object"), ({}, "at least one")):
        ids.write_text(json.dumps(named))
        with pytest.raises(UserError, match=words):
            convert("pubmedqa", tmp_path, monkeypatch, [PUBMED], "--ids", ids)
    for change, words in (({"final_decision": None}, "source: id 11: 'final_decision' is None"), ({"QUESTION": ""}, "id 11: 'QUESTION'"), ({"CONTEXTS": "We"}, "id 11: .*CONTEXTS"), ({"CONTEXTS": [1]}, "CONTEXTS")):
        with pytest.raises(UserError, match=words):
            convert("pubmedqa", tmp_path, monkeypatch, [{"11": {**PUBMED["11"], **change}}])
    with pytest.raises(UserError, match="source: not JSON: Extra data"):
        convert("pubmedqa", tmp_path, monkeypatch, [PUBMED, PUBMED])


def test_medmcqa_counts_from_one_or_from_zero(tmp_path, monkeypatch, capsys):
    for cops, answers, words in (([1, 4, 2], [0, 3, 1], "counts from 1, as its publishers"), ([3, 0, 2], [3, 0, 2], "counts from 0, as the version on Hugging Face")):
        items = convert("medmcqa", tmp_path, monkeypatch, [{**MCQ, "cop": c} for c in cops])
        assert items == [{"question": "Which? ", "choices": ["one", "two", "0.03", "four"], "answer": a, "group": "Counting", "id": "u-1"} for a in answers]
        assert words in capsys.readouterr().out
    for cops, words in (([1, 2, 3], "takes the values 1, 2, 3, "), ([0, 4], "takes the values 0, 4, "), ([4, None], "source:2: 'cop' is missing: the test split"),
                        ([-1], "source:1: 'cop' is -1: the test split"), ([1, 5], "source:2: 'cop' is 5"), ([4, "1"], "'cop' is '1'"), ([4, True], "'cop' is True")):
        with pytest.raises(UserError, match=words):
            convert("medmcqa", tmp_path, monkeypatch, [{**MCQ, **({"cop": c} if c is not None else {})} for c in cops])
    for change, words in (({"opc": None}, "source:1: 'opc' is None"), ({"opd": " "}, "'opd'"), ({"opa": float("nan")}, "'opa' is nan"), ({"question": ["?"]}, "'question'")):
        with pytest.raises(UserError, match=words):
            convert("medmcqa", tmp_path, monkeypatch, [{**MCQ, "cop": 4, **change}])


def test_medqa(tmp_path, monkeypatch):
    wanted = {"question": "What now?", "choices": ["Cut", "Wait", "Run", "Ask"], "answer": 1}
    unnumbered = {k: v for k, v in USMLE.items() if k != "answer_idx"}
    five = {**unnumbered, "options": {**USMLE["options"], "E": "Go"}, "answer": "Go"}
    twice = {**USMLE, "options": {**USMLE["options"], "A": "Wait"}}       # the index tells which
    assert convert("medqa", tmp_path, monkeypatch, [USMLE, unnumbered, five, twice]) == [
        wanted, wanted, {**wanted, "choices": [*wanted["choices"], "Go"], "answer": 4}, {**wanted, "choices": ["Wait", "Wait", "Run", "Ask"]}]
    for row, words in (({**unnumbered, "answer": "Go"}, "source:2: 'answer' 'Go' with 'answer_idx' None is 0 of"), ({**unnumbered, "options": twice["options"]}, "'Wait' with 'answer_idx' None is 2 of"),
                       ({**USMLE, "answer_idx": "C"}, "'answer_idx' 'C' is 0 of"), ({**USMLE, "options": ["Wait"]}, "source:2: 'options'"),
                       ({**USMLE, "options": {"A": "", "B": "Wait"}}, "'A' is ''"), ({**USMLE, "question": None}, "'question' is None")):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        with pytest.raises(UserError, match=words):
            convert("medqa", tmp_path, monkeypatch, [USMLE, row])
        assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UserError, match="--ids is for pubmedqa"):
        convert("medqa", tmp_path, monkeypatch, [USMLE], "--ids", tmp_path / "source")
    with pytest.raises(UserError, match="cannot be written: "):
        convert("medqa", tmp_path, monkeypatch, [USMLE], "--out", tmp_path / "source" / "out.jsonl")


def test_mmlu(tmp_path, monkeypatch):
    for name, text in (("anatomy_test", '"Which, exactly? ",one,two,"thr,ee",4,C\n'), ("college_medicine_val", "Q,a,b,c,d,A\nR,a,b,c,d,D\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    call(choice.main, monkeypatch, "mmlu", tmp_path / "anatomy_test.csv", tmp_path / "college_medicine_val.csv", "--out", tmp_path / "out.jsonl")
    first, *rest = load_choice(tmp_path / "out.jsonl")
    assert first == {"question": "Which, exactly? ", "choices": ["one", "two", "thr,ee", "4"], "answer": 2, "group": "anatomy", "subject": "anatomy", "line": 1, "where": f"{tmp_path}/out.jsonl:1"}
    assert [(x["question"], x["answer"], x["subject"]) for x in rest] == [("Q", 0, "college_medicine"), ("R", 3, "college_medicine")]
    for text in ("Q,a,b,c,d,E\n", "Q,a,b,c,D\n", "Q,a,,c,d,A\n", "question,A,B,C,D,answer\n"):
        (tmp_path / "bad_test.csv").write_text("R,a,b,c,d,B\n" + text)
        with pytest.raises(UserError, match="bad_test.csv: row 2 is .*expected a question"):
            call(choice.main, monkeypatch, "mmlu", tmp_path / "bad_test.csv", "--out", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_gene_sets(tmp_path, monkeypatch):
    for name, text, wanted in (
            ("NeST.tsv", 'NEST ID\tname_new\tGenes\nNEST:1\tMAPK signaling\t"A1,B2"\n', [{"id": "NEST:1", "genes": ["A1", "B2"], "process": "MAPK signaling"}]),
            ("M.csv", '"ID","Name","Count","Genes"\n"M:7","x, and y","2","A B-C"\n', [{"id": "M:7", "genes": ["A", "B-C"], "process": "x, and y"}]),
            ("GO_terms.csv", "GO,Genes,Gene_Count,Term_Description\nGO:1,A,1,p\nGO:2,B C,2,q\n",
             [{"id": "GO:1", "genes": ["A"], "process": "p"}, {"id": "GO:2", "genes": ["B", "C"], "process": "q"}])):
        (tmp_path / name).write_text(text)
        call(genesets.main, monkeypatch, tmp_path / name, "--out", tmp_path / "out.jsonl")
        assert [{k: v for k, v in x.items() if k not in ("line", "where", "group")} for x in load_items(tmp_path / "out.jsonl", genes="texts", process="text")] == wanted
    for text, words in (("a,b\n1,2\n", "the header is"), ("ID,Name,Genes\n1,x,A\n2,,A\n", "row 3 is"), ("ID,Name,Genes\n1,x,\n", "row 2 is"), ("", "the header is None")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            call(genesets.main, monkeypatch, tmp_path / "bad.csv", "--out", tmp_path / "none.jsonl")


OBO = "\n".join(f"[Term]\nid: {i}\nname: {name}\nnamespace: {space}\n" + "".join(f"is_a: {p} ! x\n" for p in parents) for i, name, space, *parents in (
    ("GO:0005575", "cellular_component", "cellular_component"), ("GO:0003674", "molecular_function", "molecular_function"),
    ("GO:0016020", "membrane", "cellular_component", "GO:0005575"), ("GO:0005634", "nucleus", "cellular_component", "GO:0005575"),
    ("GO:9000001", "inner membrane", "cellular_component", "GO:0016020"), ("GO:0003700", "transcription factor", "molecular_function", "GO:0003674"),
    ("GO:9000002", "binding", "molecular_function", "GO:0003674"))) + "[Term]\nid: GO:9000003\nname: nucleolus\nnamespace: cellular_component\nrelationship: part_of GO:0005634 ! n\n"


def test_gene_labels(tmp_path, monkeypatch):
    (tmp_path / "go.obo").write_text(OBO)
    annotations = [("A", "", "GO:9000001", "IEA"), ("A", "", "GO:9000002", "IDA"), ("B", "", "GO:9000003", "IDA"), ("B", "", "GO:0003700", "IDA"),
                   ("C", "", "GO:0005575", "ND"), ("C", "", "GO:0003674", "ND"), ("D", "", "GO:0005634", "IDA"), ("D", "NOT", "GO:0016020", "IDA"),
                   ("E", "", "GO:9000001", "IDA"), ("E", "NOT", "GO:0016020", "IMP"), ("F", "NOT", "GO:0005634", "IDA")]
    (tmp_path / "x.gaf").write_text("!gaf-version: 2.1\n" + "".join(
        "\t".join(["U", "id", gene, qualifier, term, "PMID:1", code, "", "C", "", "", "protein", "taxon:9606", "", ""]) + "\n" for gene, qualifier, term, code in annotations))
    call(gene_labels.main, monkeypatch, "--obo", tmp_path / "go.obo", "--gaf", tmp_path / "x.gaf", "--out", tmp_path / "out")
    found = {p.stem: {x["gene"]: x["label"] for x in load_items(p, gene="text", label="label")} for p in (tmp_path / "out").iterdir()}
    assert found == {"membrane": {"A": 1, "B": 0, "D": 0}, "nucleus": {"A": 0, "B": 1, "D": 1, "E": 0}, "transcription_factor": {"A": 0, "B": 1}}
    (tmp_path / "other.obo").write_text(OBO.replace("GO:0003700", "GO:0003701"))
    (tmp_path / "empty.gaf").write_text("!gaf-version: 2.1\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(OBO.encode())[:-9])
    for obo, gaf, out, words in (("other.obo", "x.gaf", "no", "other.obo: no term GO:0003700"), ("go.obo", "empty.gaf", "no", "empty.gaf: no annotation"),
                                 ("cut.gz", "x.gaf", "no", "cut.gz or .*x.gaf is damaged"), ("go.obo", "none.gaf", "no", "none.gaf: no such file"),
                                 ("go.obo", "x.gaf", "go.obo", "cannot be written")):
        with pytest.raises(UserError, match=words):
            call(gene_labels.main, monkeypatch, "--obo", tmp_path / obo, "--gaf", tmp_path / gaf, "--out", tmp_path / out)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_users_mistake_is_one_line(tmp_path):
    started = [subprocess.Popen([sys.executable, ROOT / "prepare" / script, *args, "nowhere", "--out", "out"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
               for script, *args in (["medquad.py"], ["choice.py", "pubmedqa"])]
    for process in started:
        said = process.communicate()[1]
        assert process.returncode == 2 and said.startswith("error: nowhere: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
