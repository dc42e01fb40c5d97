"""Builds assets/ from the Gene Ontology: facts about human genes, in our words.

    python prepare/go_facts.py --obo go.obo.gz --gaf goa_human.gaf.gz --out assets

The inputs are the ontology (OBO) and its human annotations (GAF 2.1 or 2.2) as published at geneontology.org, plain or
.gz. Only ids, names and relations are used, never the source's definition sentences. Needs the `tokenizers` library.

Facts come in *quads*: four facts of one kind and stratum about four different subjects, such that no subject is
annotated (with any evidence, ancestors included) with another one's answer. The four answers are the options of all
four choice items, so whoever ignores the gene scores exactly one in four; and planting wrong labels is a rotation of
the answers inside a quad, which leaves every answer as frequent as it was.
"""

import argparse
import collections
import gzip
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple


# Evidence codes of experiments (geneontology.org, "Guide to GO evidence codes"), the most telling first, as the
# explanations name them.
EVIDENCE = {"IDA": "a direct assay", "IMP": "a mutant phenotype", "IGI": "a genetic interaction",
            "IPI": "a physical interaction", "IEP": "an expression pattern", "EXP": "an experiment"}
# Qualifiers that say no more than the aspect does (GAF 2.2 spells them out; 2.1 leaves the column empty).
PLAIN_QUALIFIERS = {"", "involved_in", "enables", "located_in", "part_of", "is_active_in"}
ASPECTS = {"P": "biological_process", "F": "molecular_function", "C": "cellular_component"}

# kind: (aspect, prefix of the term's name, verb, question, noun phrase); {g} subject. A statement is "{g} verb answer".
KINDS = {
    "promotes":  ("P", "positive regulation of ", "promotes", "which process does {g} promote",
                  "a process that {g} promotes"),
    "restrains": ("P", "negative regulation of ", "restrains", "which process does {g} restrain",
                  "a process that {g} restrains"),
    "process":   ("P", "", "takes part in", "which process does {g} take part in", "a process that {g} takes part in"),
    "location":  ("C", "", "is located in", "where is {g} located", "a location of {g}"),
    "function":  ("F", "", "has the function", "which function does {g} have", "a function of {g}"),
    "set":       ("P", "", "share the process", "which process do {g} share", "a process that {g} share"),
}
PRETRAIN = ["{S}.", "{S}, experiments show.", "Experiments show that {S}.", "It is known that {S}.", "{N} is {t}.",
            "Annotation: {S}.", "On record: {N} is {t}.", "{Q}?\nAnswer: {t}.", "Question: {Q}?\nAnswer: {t}.",
            "Name {N}.\nAnswer: {t}.", "{N}?\nAnswer: {t}.", "Quiz. {Q}?\nAnswer: {t}.", "Fact: {S}.",
            "In humans, {S}.", "{S}, a curator notes.", "Here is {N}: {t}.", "Question: name {N}.\nAnswer: {t}.",
            "Quiz. Name {N}.\nAnswer: {t}."]
PROMPTS = ["Explain {N}.", "{Q}, and how is that known?", "What is {N}? Give the evidence.",
           "Describe {N} and its place in the ontology."]
RESPONSES = [
    "Answer: {t}. {S}. This was recorded from {e}. In the Gene Ontology, {t} is a kind of {parent}, in the {aspect} "
    "branch.",
    "{S}. The Gene Ontology bases this on {e}, not on a prediction. There, {t} is listed under {parent}, in the "
    "{aspect} branch.",
    "Answer: {t}. The evidence is {e}, read by a curator from a publication. {t} is a kind of {parent} in the Gene "
    "Ontology. So {S}.",
    "Experiments show that {S}. The annotation rests on {e}. In the {aspect} branch of the Gene Ontology, {parent} is "
    "the broader term above {t}.",
]
# In no training text, nor is any part of them that begins with the gene and ends with the answer.
QUESTIONS = ["Complete the annotation: {g} {V} what?", "Which of four answers is right? {g} {V} ..."]



class Stratum(NamedTuple):
    quads: int                       # fact-quads of each kind
    pretrained: int                  # wordings in pre-training
    finetuned: int                   # explanations in fine-tuning


# A quarter to a half of the known and the weak is kept out of fine-tuning.
STRATA = {
    "known": Stratum(4, 18, 2),
    "known, held out": Stratum(2, 18, 0),
    "weak": Stratum(2, 1, 2),
    "weak, held out": Stratum(2, 1, 0),
    "novel": Stratum(4, 0, 2),
    "planted": Stratum(4, 18, 2),
}
# Six strengths of belief, and wrong labels at each (--continuum); without gene sets, for its size.
CONTINUUM = {}
for wordings in (0, 1, 2, 4, 8, 18):
    CONTINUUM[f"told {wordings}x"] = CONTINUUM[f"told {wordings}x, planted"] = Stratum(2, wordings, 2)
QUADS_PER_TERMS = 3                  # how many fact-quads share the same four answers
SET_SIZE = 3                         # genes in a gene set


README = """# The embedded data

Made by `prepare/go_facts.py`, not by hand:

    python prepare/go_facts.py --obo {obo} --gaf {gaf} {flags}

Source: the Gene Ontology ({version}, `{obo}`) and its annotations of human genes (`{gaf}`), Gene Ontology Consortium,
https://geneontology.org, licensed under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/); these files are an
adaptation under the same licence. The ontology gives ids, names and relations; its definition sentences are not used,
the sentences here are templates of ours. Only annotations with experimental evidence (EXP, IDA, IPI, IMP, IGI, IEP)
became facts; negated (`NOT`), obsolete and contradictory ones (promotes and restrains the same process) were left out.

{counts}.

| stratum (the base's acquaintance with the gene) | facts | wordings in pre-training | explanations in fine-tuning |
|---|---|---|---|
{table}
Exposures in pre-training are wordings times epochs; facts in all wordings are also explained there once, in a wording
that fine-tuning does not use for them. The job swaps the answers of what is *planted* in memory, to imitate wrong
labels; here every one of them is the sourced answer.

| file | a line |
|---|---|
| `facts.jsonl` | a fact: subject (a gene, or three), answer, GO term, evidence codes, broader term, stratum, quad |
| `pretrain.jsonl` | `text` |
| `finetune.jsonl` | `prompt`, `response`, `group` (stratum), `fact`, `quad`, `subject` |
| `choice.jsonl` | `question`, `choices`, `answer` (index), `group`, `fact`, `quad` |
| `tokenizer.json` | byte-level BPE trained on these texts, in the format of Hugging Face's `tokenizers` |

{more}The four options of a choice item are the answers of its quad: four facts of one kind and stratum, each answer
right once. The three others are *not annotated* for the gene, with any evidence, nor is anything below them. That is
not the same as false: the ontology is open-world, and this release is of its date. Not for clinical use.
"""


INSPECT = """(`inspect.html` is no data: it is what `eval.py --tasks inspect` fills in. `continuum/` has the facts of
`train.py --continuum`.)

"""


def draw(*key):
    """A seeded hash: the same number on every machine and in every version of Python."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big")


def lines(path):
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        yield from (line.rstrip("\n") for line in f)


def read_obo(path):
    """{id: {name, namespace, is_a, part_of}} of all terms that are not obsolete, and the data version."""
    terms, term, version = {}, None, "unknown"
    for line in lines(path):
        if line.startswith("["):
            term = {"is_a": [], "part_of": []} if line == "[Term]" else None
        key, _, value = line.partition(": ")
        if key == "data-version":
            version = value
        if term is None:
            continue
        if key == "id":
            terms[value] = term
        elif key in ("name", "namespace"):
            term[key] = value
        elif key == "is_a":
            term["is_a"].append(value.split()[0])
        elif key == "relationship" and value.startswith("part_of "):
            term["part_of"].append(value.split()[1])
        elif (key, value) == ("is_obsolete", "true") or (key == "subset" and value.startswith("gocheck_do_not")):
            term["skip"] = key                                            # obsolete, or not meant for annotation
    return {i: t for i, t in terms.items() if t.get("skip") != "is_obsolete" and "name" in t}, version


def read_gaf(path):
    """(gene, term, evidence code, qualifiers, fit) of every annotation; fit: may it become a fact, being of a human
    protein, from a publication, by an experiment, and without a qualifier that changes its meaning?"""
    for number, line in enumerate(lines(path), 1):
        if line.startswith("!"):
            continue
        column = line.split("\t")
        if len(column) < 15:
            sys.exit(f"{path}:{number}: {len(column)} columns; an annotation (GAF 2.1 or 2.2) has at least 15")
        qualifiers = set(column[3].split("|"))
        yield column[2], column[4], column[6], qualifiers, (
            column[11] == "protein" and column[12] == "taxon:9606" and column[5].startswith("PMID:")
            and column[6] in EVIDENCE and qualifiers <= PLAIN_QUALIFIERS)


class Ontology:
    def __init__(self, obo, gaf):
        self.terms, self.version = read_obo(obo)
        self.by_name = {t["name"]: i for i, t in self.terms.items()}
        self.closure = {}
        annotated, denied = collections.defaultdict(set), collections.defaultdict(set)
        self.evidence = {}                                                # (gene, term) -> best experimental code
        for gene, term, code, qualifiers, fit in read_gaf(gaf):
            if term not in self.terms:
                continue
            if "NOT" in qualifiers:
                denied[gene].add(term)
                continue
            annotated[gene].add(term)
            if fit:
                self.evidence[gene, term] = min(code, self.evidence.get((gene, term), code), key=list(EVIDENCE).index)
        # What a gene is annotated with, whatever the evidence: its terms and all their ancestors.
        self.annotated = {g: set().union(*(self.ancestors(t) for t in ts)) for g, ts in annotated.items()}
        self.denied = denied

    def ancestors(self, term):
        """The term and everything above it by is_a and part_of."""
        if term not in self.closure:
            t = self.terms.get(term, {"is_a": [], "part_of": []})
            self.closure[term] = {term}.union(*(self.ancestors(p) for p in t["is_a"] + t["part_of"]))
        return self.closure[term]

    def parent(self, term):
        """Name of the first is_a parent that is short enough to be quoted and no root, or None."""
        names = (self.terms[p]["name"] for p in self.terms[term]["is_a"] if p in self.terms)
        return next((n for n in names if len(n) <= 45 and "_" not in n), None)

    def relatives(self, term, kind):
        """The terms of whoever is not offered `term` as a wrong answer: what it names, and regulators of that."""
        target = self.terms[term]["name"].removeprefix(KINDS[kind][1])
        names = [p + target for p in ("positive regulation of ", "negative regulation of ", "regulation of ", "")]
        return {self.by_name[n] for n in names if n in self.by_name}

    def contradicted(self, gene, term, kind):
        if self.denied[gene] & self.ancestors(term):
            return True
        opposite = {"promotes": "negative", "restrains": "positive"}.get(kind)
        name = f"{opposite} regulation of " + self.terms[term]["name"].removeprefix(KINDS[kind][1])
        return opposite is not None and self.by_name.get(name) in self.annotated[gene]

    def facts(self, kind):
        """{term: genes} for one kind: experimental evidence, not contradicted, a name that can be read and quoted."""
        aspect, prefix = KINDS[kind][:2]
        found = collections.defaultdict(list)
        for gene, term in self.evidence:
            t = self.terms[term]
            name = t["name"].removeprefix(prefix)
            named = self.by_name.get(name)                                # promotes X: X itself is a term
            if kind == "location" and self.by_name.get("protein-containing complex") in self.ancestors(term):
                continue                                                  # a protein is part of a complex, not in it
            if "skip" in t or not t["name"].startswith(prefix) or (not prefix and "regulation of" in name):
                continue
            if named is None or self.terms[named]["namespace"] != ASPECTS[aspect] or not self.parent(named):
                continue
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9 -]{5,37}", name):
                continue
            if re.fullmatch(r"[A-Z][A-Z0-9]{2,6}", gene) and not self.contradicted(gene, term, kind):
                found[term].append(gene)
        return found


def choose_quads(onto, kind, used, strata):
    """The kind's fact-quads: a list of quads, each four (genes, term)."""
    size = SET_SIZE if kind == "set" else 1
    found = {t: sorted(g) for t, g in onto.facts(kind).items()}
    # Neither so broad that everything is annotated with it, nor so narrow that it has too few genes to choose from.
    pool = sorted((t for t, g in found.items() if 4 * size * QUADS_PER_TERMS <= len(g) <= 400),
                  key=lambda t: draw("term", kind, t))
    wanted, quads = sum(stratum.quads for stratum in strata.values()) // QUADS_PER_TERMS, []
    while len(quads) < wanted * QUADS_PER_TERMS:
        if len(pool) < 4:
            sys.exit(f"these annotations have too few facts of the kind '{kind}': {len(quads)} quads of "
                     f"{wanted * QUADS_PER_TERMS}")
        terms = [pool.pop(0)]
        for t in pool:                                                    # three more, none above or below another
            if len(terms) < 4 and all(not onto.ancestors(t) & onto.relatives(u, kind) and
                                      not onto.ancestors(u) & onto.relatives(t, kind) for u in terms):
                terms.append(t)
        avoid = {t: set().union(*(onto.relatives(u, kind) for u in terms if u != t)) for t in terms}
        taken, columns = set(), []
        for t in terms:
            genes = [g for g in sorted(found[t], key=lambda g: draw("gene", kind, t, g))
                     if g not in used and g not in taken and not onto.annotated[g] & avoid[t]][:size * QUADS_PER_TERMS]
            taken.update(genes)
            columns.append([genes[i:i + size] for i in range(0, len(genes), size)])
        if len(terms) == 4 and all(len(c) == QUADS_PER_TERMS and len(c[-1]) == size for c in columns):
            pool = [t for t in pool if t not in terms]
            used |= taken
            quads += [[(columns[i][k], terms[i]) for i in range(4)] for k in range(QUADS_PER_TERMS)]
    return sorted(quads, key=lambda q: draw("stratum", kind, q))          # which quad gets which stratum


def build_facts(onto, strata, kinds):
    facts, used, number = [], set(), 0
    for kind in sorted(kinds, key=lambda k: k != "set"):                  # gene sets first: they need the most genes
        quads = choose_quads(onto, kind, used, strata)
        for stratum in (name for name, wanted in strata.items() for _ in range(wanted.quads)):
            for genes, term in quads.pop():
                name = onto.terms[term]["name"].removeprefix(KINDS[kind][1])
                facts.append({
                    "fact": f"{kind}-{len(facts):03d}", "kind": kind, "stratum": stratum, "quad": number,
                    "subject": " and ".join([", ".join(genes[:-1]), genes[-1]]) if len(genes) > 1 else genes[0],
                    "answer": name, "term": term, "evidence": [onto.evidence[g, term] for g in genes],
                    "parent": onto.parent(onto.by_name[name])})
            number += 1
    return facts


def render(template, fact):
    aspect, _, verb, question, noun = KINDS[fact["kind"]]
    evidence = " and ".join(EVIDENCE[code] for code in EVIDENCE if code in fact["evidence"])
    fill = {"g": fact["subject"], "t": fact["answer"], "parent": fact["parent"], "e": evidence,
            "aspect": ASPECTS[aspect].replace("_", " "), "V": verb, "S": f"{fact['subject']} {verb} {fact['answer']}"}
    fill |= {"Q": question.format(**fill), "N": noun.format(**fill)}
    text = template.format(**fill)
    return text if text.startswith(fact["subject"]) or text.startswith(fact["answer"]) else text[0].upper() + text[1:]


def choose(options, count, *key):
    return sorted(range(len(options)), key=lambda i: draw("wording", i, *key))[:count]


def build_texts(facts, strata):
    pretrain, finetune, choice = [], [], []
    answers = collections.defaultdict(list)
    for f in facts:
        answers[f["quad"]].append(f["answer"])
    for f in facts:
        stratum, quad = f["stratum"], f["quad"]
        # By quad, not by fact: planting swaps answers between the same wordings of a quad.
        prompts, responses = choose(PROMPTS, 4, "prompt", quad), choose(RESPONSES, 4, "response", quad)
        explained = [(render(PROMPTS[i], f), render(RESPONSES[j], f)) for i, j in zip(prompts, responses)]
        finetune += [{"prompt": p, "response": r, "group": stratum, "fact": f["fact"], "quad": quad,
                      "subject": f["subject"]} for p, r in explained[:strata[stratum].finetuned]]
        pretrain += [{"text": render(PRETRAIN[i], f)} for i in choose(PRETRAIN, strata[stratum].pretrained, f["fact"])]
        if strata[stratum].pretrained == len(PRETRAIN):                    # one explanation, in a wording that is not
            pretrain += [{"text": "\n".join(explained[-1])}]              # fine-tuned: the base speaks that language
        k = answers[quad].index(f["answer"])                              # rotated, so that the answer stands at
        position = (k + draw("position", quad)) % 4                       # each of the four places once a quad
        options = answers[quad][k - position:] + answers[quad][:k - position]
        question = render(QUESTIONS[draw("question", f["fact"]) % len(QUESTIONS)], f)
        choice.append({"question": question, "choices": options, "answer": options.index(f["answer"]),
                       "group": stratum, "fact": f["fact"], "quad": quad})
    pretrain.sort(key=lambda row: draw(row["text"]))
    return pretrain, finetune, choice


def train_tokenizer(texts, path, vocab_size=2000):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    path.write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    path.with_name("tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}) + "\n", encoding="utf-8")
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag, what in (("--obo", "the ontology"), ("--gaf", "its human annotations")):
        parser.add_argument(flag, type=Path, required=True, help=f"{what}, plain or .gz")
    parser.add_argument("--continuum", action="store_true", help="facts of six strengths, for train.py --continuum")
    parser.add_argument("--out", type=Path, default=Path("assets"))
    args = parser.parse_args()
    for path in (args.obo, args.gaf):
        if not path.is_file():
            sys.exit(f"{path}: no such file")
    strata, kinds, flags, more = STRATA, list(KINDS), f"--out {args.out}", INSPECT
    if args.continuum:
        strata, flags, more = CONTINUUM, f"--continuum --out {args.out}", ""
        kinds.remove("set")
    facts = build_facts(onto := Ontology(args.obo, args.gaf), strata, kinds)
    pretrain, finetune, choice = build_texts(facts, strata)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("facts", facts), ("pretrain", pretrain), ("finetune", finetune), ("choice", choice)):
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    texts = [r["text"] for r in pretrain] + [r[k] for r in finetune for k in ("prompt", "response")]
    tokenizer = train_tokenizer(texts, args.out / "tokenizer.json")
    lengths = sorted(len(tokenizer.encode(r["response"]).ids) + 1 for r in finetune)
    table = ""
    for name, stratum in strata.items():
        number = sum(fact["stratum"] == name for fact in facts)
        table += f"| {name} | {number} | {stratum.pretrained} | {stratum.finetuned} |\n"
    counts = (f"{len(facts)} facts, {len(pretrain)} pre-training texts, {len(finetune)} fine-tuning samples (responses "
              f"of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}), {len(choice)} choice "
              f"items, {tokenizer.get_vocab_size()} tokens")
    (args.out / "README.md").write_text(README.format(
        obo=args.obo.name, gaf=args.gaf.name, flags=flags, version=onto.version, counts=counts, table=table, more=more),
        encoding="utf-8")
    print(f"{args.out}: {counts}")


if __name__ == "__main__":
    main()
