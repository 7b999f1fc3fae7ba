"""A GPT-2 trained by the Hugging Face Trainer, and a second Trainer that resumes it half way.

``python examples/hf_trainer.py`` trains on bytes of Python's own standard library. The resumed run has the same losses,
dropout included: checkpoints of a converted model are ordinary ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from small_data import text
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import reversa
from reversa.train.huggingface import MemoryMonitor


class Pieces(Dataset):
    """The text in pieces of 64 bytes."""

    def __init__(self) -> None:
        self.pieces = text()[: 64 * 1024].view(-1, 64)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def make_trainer(folder: str, steps: int) -> Trainer:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=8, n_head=4, bos_token_id=0, eos_token_id=0)
    model = reversa.convert(GPT2LMHeadModel(config), scheme=reversa.Momentum(0.9))
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=1,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=Pieces(), callbacks=[MemoryMonitor(every=steps)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def told(trainer: Trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def main(steps: int = 20, folder: str = "runs/hf_trainer") -> tuple[list[float], list[float]]:
    first = make_trainer(folder, steps)
    first.train()
    again = make_trainer(folder, steps)
    again.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{steps // 2}"))
    losses, resumed = told(first, "loss"), told(again, "loss")  # the history before the checkpoint is in it
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps, {resumed[-1]:.3f} when resumed half way")
    print(f"{told(first, 'memory/peak_bytes')[-1] / 2**20:.1f} MiB at the peak of a training step")
    return losses, resumed


if __name__ == "__main__":
    main()
