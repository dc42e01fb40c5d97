"""The adapter for transformers' Trainer that docs/forking.md shows, taken from there."""

import re

import pytest
import torch
from support import ROOT

import bft


LENGTHS = (3, 14, 5, 9, 4, 12, 6, 7)                                      # of the responses of eight samples


@pytest.fixture
def adapter():
    """What the page's own lines define."""
    import transformers
    page = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")
    code, = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class BFTTrainer" in block)
    scope = {"bft": bft, "Trainer": transformers.Trainer}
    exec(code, scope)
    return scope


def gradient(trainer_class, accumulation, loss, directory):
    """The gradient of the first optimizer step on eight samples of unequal length, eight / accumulation at a time."""
    import transformers
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    rows = []
    for n in LENGTHS:
        ids, labels = torch.randint(31, (15,)), torch.full((15,), -100)
        labels[15 - n:] = ids[15 - n:]
        rows.append({"input_ids": ids, "labels": labels})
    seen = []

    class Peek(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())

    arguments = transformers.TrainingArguments(
        directory, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, max_steps=1,
        report_to=[], max_grad_norm=0.0, use_cpu=True, save_strategy="no", disable_tqdm=True)
    trainer_class(model=model, args=arguments, train_dataset=rows, compute_loss_func=loss, callbacks=[Peek()]).train()
    return seen[0]


def ignores_the_denominator(outputs, labels, num_items_in_batch=None):
    return bft.loss_from_logits(outputs.logits, labels)


@pytest.mark.slow
def test_the_adapter_has_the_same_gradient_at_every_accumulation(adapter, tmp_path):
    for trainer, loss in ((adapter["Trainer"], "sft_loss"), (adapter["BFTTrainer"], "bft_loss")):
        one, four = (gradient(trainer, accumulation, adapter[loss], tmp_path) for accumulation in (1, 4))
        assert (four - one).norm() < 1e-5 * one.norm()
    # The plain Trainer passes the number of *tokens*: bft divided by that is off by the mean response length, 60 / 8.
    wrong = gradient(adapter["Trainer"], 4, adapter["bft_loss"], tmp_path)
    assert wrong.norm() / one.norm() == pytest.approx(8 / 60, rel=1e-3)
    # A loss that ignores that number, as the authors' does, is as many times too large as there are micro-batches.
    too_large = gradient(adapter["Trainer"], 4, ignores_the_denominator, tmp_path)
    assert too_large.norm() / one.norm() == pytest.approx(4, rel=1e-3)
