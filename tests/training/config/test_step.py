from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from training.config.presets import RECIPES, Recipe
from training.config.step import StepConfig, eager_mode
from training.data.loading import make_loader
from training.data.tracklets import Split
from training.engine.build import make_optimizer, make_sampler
from training.engine.metrics_log import RunLog
from training.engine.options import make_options
from training.engine.trainer import Trainer
from training.model.losses import Losses
from training.model.network import Network
from training.runtime.errors import UserError
from training.runtime.fields import update
from training.train import train

CPU = torch.device("cpu")
BASELINE = update(RECIPES["quick"], rru="none", part_loss=False)


def trainer_of(recipe: Recipe, step: StepConfig) -> Trainer:
    torch.manual_seed(1)
    network = Network(recipe.model, 4, "fast")
    return Trainer(network, Losses(recipe.loss, "fast"), make_optimizer(network, recipe.optim), step)


def train_an_epoch(trainer: Trainer, recipe: Recipe, split: Split, folder: Path) -> list[dict[str, Any]]:
    loader = make_loader(split.train, make_sampler(recipe, split.train), recipe.batch.frames, workers=0)
    with RunLog(folder, Console(file=io.StringIO()), epochs=1) as log:
        trainer.run_epoch(loader, log)
    return log.records


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_a_16_bit_step_has_the_losses_of_a_full_one_within_its_precision(
    recipe: Recipe, split: Split, tmp_path: Path, amp: Any
) -> None:
    dtypes: list[torch.dtype] = []
    losses = []
    for step in (StepConfig(), StepConfig(amp=amp)):
        trainer = trainer_of(recipe, step)
        trainer.network.head.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
        folder = tmp_path / step.amp
        folder.mkdir()
        losses.append(train_an_epoch(trainer, update(recipe, batches=1), split, folder)[0])
    assert dtypes == [torch.float32, getattr(torch, amp)]
    for part in ("identity", "video", "part"):
        assert losses[1][part] == pytest.approx(losses[0][part], rel=0.1)
        assert losses[1][part] != losses[0][part]


def test_an_overflowing_float16_gradient_moves_nothing_and_lowers_the_scale(
    recipe: Recipe, split: Split, tmp_path: Path
) -> None:
    trainer = trainer_of(recipe, StepConfig(amp="float16"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.clone() for parameter in trainer.network.parameters()]
    train_an_epoch(trainer, recipe, split, tmp_path)
    assert all(map(torch.equal, before, trainer.network.parameters()))
    assert trainer.scaler.get_scale() == 2.0**38  # of two steps
    resumed = trainer_of(recipe, StepConfig(amp="float16"))
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.scaler.get_scale() == 2.0**38
    trainer_of(recipe, StepConfig()).load_state_dict(trainer.state_dict())


def test_channels_last_reaches_the_convolutions_and_changes_no_loss(
    recipe: Recipe, split: Split, tmp_path: Path
) -> None:
    laid: list[tuple[bool, bool]] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        last = {"memory_format": torch.channels_last}
        laid.append((module.weight.is_contiguous(**last), given[0].is_contiguous(**last)))

    losses = []
    for step in (StepConfig(), StepConfig(channels_last=True)):
        trainer = trainer_of(recipe, step)
        for module in trainer.network.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(note)
        folder = tmp_path / str(step.channels_last)
        folder.mkdir()
        losses.append([record["loss"] for record in train_an_epoch(trainer, recipe, split, folder)])
    assert laid[:8] == [(False, False)] * 8
    assert laid[8:] == [(True, True)] * 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_compiled_backbone_trains_alike_under_the_same_names_and_is_left_out_of_evaluation(
    recipe: Recipe, split: Split, tmp_path: Path
) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(sum(node.op == "call_module" or node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    losses, names = [], []
    # What the compiler makes of the graph is PyTorch's own, and takes it a minute.
    with torch.compiler.set_stance(force_backend=backend):
        for step in (StepConfig(), StepConfig(compile_backbone=True)):
            trainer = trainer_of(recipe, step)
            folder = tmp_path / str(step.compile_backbone)
            folder.mkdir()
            losses.append([record["loss"] for record in train_an_epoch(trainer, recipe, split, folder)])
            names.append(list(trainer.network.state_dict()))
    assert len(compiled) == 1 and compiled[0] >= 12  # both steps' four convolutions, norms, activations: one graph
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and names[1] == names[0]
    with torch.no_grad(), eager_mode(trainer.network):
        trainer.network.eval()(torch.rand(1, 3, 3, 64, 64))
    assert len(compiled) == 1


def test_evaluation_captures_no_graphs_and_training_does_again(recipe: Recipe) -> None:
    network = Network(recipe.model, 4, "fast", cuda_graph=True)
    with eager_mode(network), torch.no_grad():
        network.eval()(torch.rand(1, 2, 3, 64, 64))
    with pytest.raises(ValueError, match="cuda_graph: got True with tensors on cpu"):
        network(torch.rand(1, 2, 3, 64, 64))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: StepConfig(amp="half"), "amp: got 'half', wanted one of off, bfloat16, float16"),  # type: ignore[arg-type]
        (lambda: StepConfig(channels_last=1), "channels_last: got 1, wanted True or False"),  # type: ignore[arg-type]
        (
            lambda: StepConfig(cuda_graph=True).check(CPU, RECIPES["quick"]),
            "cuda_graph: got True on device 'cpu', wanted",
        ),
        (
            lambda: StepConfig("reference", cuda_graph=True).check(torch.device("cuda"), RECIPES["quick"]),
            "cuda_graph: got True with ops='reference'",
        ),
        (
            lambda: StepConfig(cuda_graph=True).check(torch.device("cuda"), BASELINE),
            "rru='none', wanted an RRU",
        ),
    ],
)
def test_a_switch_that_cannot_be_set_is_named(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask()


def test_graphs_on_a_cpu_end_a_run_before_it_leaves_anything(small_data: Path, tmp_path: Path) -> None:
    data = {"dataset": "ilids-vid", "data_root": small_data, "check_counts": False, "device": "cpu"}
    with pytest.raises(UserError, match="cuda_graph: got True on device 'cpu'"):
        train(make_options(**data, output=tmp_path / "run", cuda_graph=True))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
