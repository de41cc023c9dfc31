"""A small language model: a decoder-only transformer over bytes, trained on the manual that ships with Python.

Llama's block in small (Touvron et al., 2023, arXiv:2302.13971): RMSNorm before attention and before the MLP, rotary positions
(Su et al., 2021, arXiv:2104.09864), SwiGLU (Shazeer, 2020, arXiv:2002.05202), no biases. A token is a byte, so there is no
tokenizer, and perplexity is per byte: its base-2 logarithm is bits per byte.

    trainer = Trainer(max_epochs=6, gradient_clip_val=1.0)
    trainer.fit(TransformerLM(), datamodule=PythonTopicsDataModule())
"""

import math
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.text import Perplexity

BYTES = 256
# characters that are held out in one piece, or not
PIECE = 4096


def manual() -> str:
    """The topics of Python's ``help()`` in the order of their names, each without the paragraphs of those before it.

    Topics repeat each other, and what is held out must not stand in the train text.
    """
    paragraphs = [text.strip("\n") for name in sorted(topics) for text in topics[name].split("\n\n")]
    return "\n\n".join(dict.fromkeys(paragraphs))


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Text cut into pieces of ``length`` bytes, each with the bytes that follow: int64 ``(length,)`` twice."""

    def __init__(self, text: str, length: int) -> None:
        self.bytes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` is {index}, of {len(self)} windows.")
        piece = self.bytes[index * self.length :][: self.length + 1].long()
        return piece[:-1], piece[1:]


class PythonTopicsDataModule(LightningDataModule):
    """Python's own reference manual, as ``help()`` has it, in ``(bytes, following bytes)``: int64 ``(batch, length)`` each.

    The text is the same wherever the version of Python is. Of pieces of 4096 characters every tenth is held out.

    Args:
        length: bytes in a window; a prediction sees nothing before it.
        batch_size: windows in a train batch.
        eval_batch_size: windows in a validation batch.
        limit: characters of the manual to take; ``None`` takes all.
    """

    def __init__(self, length: int = 128, batch_size: int = 16, eval_batch_size: int = 32, limit: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        text = manual()[: self.hparams["limit"]]
        pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        held_out = pieces[9::10]
        del pieces[9::10]
        self.train_set = Windows("".join(pieces), self.hparams["length"])
        self.val_set = Windows("".join(held_out), self.hparams["length"])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, self.hparams["eval_batch_size"])


class Attention(nn.Module):
    """Causal self-attention over ``(batch, length, width)`` with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2))
        return y

    def _split(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` to ``(batch, heads, length, width / heads)``."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair ``x[..., i], x[..., i + n / 2]`` by the angle of its position and ``i``: RoPE's equation 34."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class TransformerLM(LightningModule):
    """Bytes, int64 ``(batch, length)``, to logits of each one's successor, ``(batch, length, 256)``.

    Trained by AdamW with a linear warm-up over a twentieth of the steps and half a cosine down to zero.

    Args:
        layers: blocks.
        width: features between the blocks.
        heads: of attention; they share the width.
        hidden: features inside an MLP.
        max_length: positions that there are angles for.
        lr: peak learning rate.
        weight_decay: of matrices; norms have none.
    """

    def __init__(
        self,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        hidden: int = 512,
        max_length: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # what is added to the residual stream starts smaller, the more blocks there are (GPT-2)
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)
        half = width // heads // 2
        angles = torch.outer(torch.arange(max_length), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.val_perplexity = Perplexity()
        self.example_input_array = torch.zeros(2, max_length, dtype=torch.int64)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, following = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        tokens, following = batch
        logits = self(tokens)
        self.val_perplexity(logits, following)
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), following.flatten()), sync_dist=True)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": self.hparams["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.hparams["lr"], betas=(0.9, 0.99))
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, steps // 20)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
