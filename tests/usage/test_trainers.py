"""Training loops that others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minifuse.records import RECORDS
from tests.judge import twin
from tests.usage.llama import llama
from tests.usage.models import Language, Perceptron, loss_of, texts


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    RECORDS.clear()


def stages() -> set[str]:
    return {r.stage for r in RECORDS}


# -- transformers ---------------------------------------------------------------------------------------
def trainer(model: nn.Module, data: Tensor, folder: Path, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer is built on it")
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=[{"input_ids": w, "labels": w} for w in data])


def test_transformers_trainer_follows_eager(tmp_path: Path) -> None:
    def losses(model: nn.Module) -> list[float]:
        run = trainer(model, data, tmp_path, learning_rate=1e-2)
        run.train()
        return [line["loss"] for line in run.state.log_history if "loss" in line]

    model, data = llama(), texts(12)
    eager = twin(model)
    model.compile(backend="minifuse")
    assert losses(model) == pytest.approx(losses(eager), rel=1e-4)
    assert stages() == {"forward", "backward"}


def test_transformers_own_setting_admits_no_backend_of_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'MINIFUSE' is not a valid DynamoBackend"):
        trainer(llama(), texts(), tmp_path, torch_compile_backend="minifuse")


# -- accelerate -----------------------------------------------------------------------------------------
def test_accelerate_follows_eager() -> None:
    accelerate = pytest.importorskip("accelerate")
    data = list(texts(16))

    def losses(model: nn.Module) -> list[float]:
        torch.manual_seed(1)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        found = []
        for words in loader:
            with accelerator.accumulate(model):
                loss = loss_of(model, words)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found

    model = Language(Perceptron)
    eager = twin(model)
    model.compile(backend="minifuse")
    assert losses(model) == pytest.approx(losses(eager), rel=1e-5)
    assert stages() == {"forward", "backward"}


def test_accelerate_s_plugin_admits_no_backend_of_others() -> None:
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="'MINIFUSE' is not a valid DynamoBackend"):
        accelerate.utils.TorchDynamoPlugin(backend="minifuse")


# -- Lightning ------------------------------------------------------------------------------------------
def test_lightning_follows_eager() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, words: Tensor) -> Tensor:
            loss = loss_of(self.model, words)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.3)

    def losses(model: nn.Module) -> list[float]:
        module = Module(model)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        loader = torch.utils.data.DataLoader(list(data), batch_size=4)
        lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet).fit(module, loader)
        return module.losses

    data = texts(12)
    model = Language(Perceptron)
    eager = twin(model)
    model.compile(backend="minifuse")
    assert losses(model) == pytest.approx(losses(eager), rel=1e-5)
    assert stages() == {"forward", "backward"}
