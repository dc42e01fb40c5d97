"""The adapter for transformers' Trainer that README shows, taken from README."""

import re
from pathlib import Path

import pytest
import torch

import bft


transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
ADAPTER, = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "class BFTTrainer" in code)


def gradient(trainer_class, accumulation, loss, tmp_path):
    """The gradient of the first optimizer step on eight samples of unequal length, eight / accumulation at a time."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    rows = []
    for n in (3, 14, 5, 9, 4, 12, 6, 7):
        ids, labels = torch.randint(31, (15,)), torch.full((15,), -100)
        labels[15 - n:] = ids[15 - n:]
        rows.append({"input_ids": ids, "labels": labels})
    seen = []

    class Peek(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())

    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, max_steps=1,
        report_to=[], max_grad_norm=0.0, use_cpu=True, save_strategy="no", disable_tqdm=True)
    trainer_class(model=model, args=arguments, train_dataset=rows, compute_loss_func=loss, callbacks=[Peek()]).train()
    return seen[0]


def test_the_adapter_has_the_same_gradient_at_every_accumulation(tmp_path):
    scope = {"bft": bft, "Trainer": transformers.Trainer}
    exec(ADAPTER, scope)                                                  # README's own lines
    relative = lambda a, b: ((a - b).norm() / b.norm()).item()            # noqa: E731
    for trainer, loss in ((transformers.Trainer, scope["sft_loss"]), (scope["BFTTrainer"], scope["bft_loss"])):
        one, four = (gradient(trainer, k, loss, tmp_path) for k in (1, 4))
        assert relative(four, one) < 1e-5
    # The plain Trainer passes the number of *tokens*: bft divided by that is off by the mean response length, 60 / 8.
    wrong = gradient(transformers.Trainer, 4, scope["bft_loss"], tmp_path)
    assert wrong.norm() / one.norm() == pytest.approx(8 / 60, rel=1e-3)
    # A loss that ignores that number, as the authors' does, is as many times too large as there are micro-batches.
    ignores = gradient(transformers.Trainer, 4, lambda outputs, labels, num_items_in_batch=None: bft.loss_from_logits(
        outputs.logits, labels), tmp_path)
    assert ignores.norm() / one.norm() == pytest.approx(4, rel=1e-3)
