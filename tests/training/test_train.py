from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rru_fast import backends
from tests.helpers.forked import command
from tests.helpers.small_runs import last, metrics, options
from training.engine import checkpoint
from training.engine.options import make_options
from training.evaluate import Options as EvaluateOptions
from training.evaluate import evaluate
from training.pack import Options as PackOptions
from training.pack import pack
from training.runtime.errors import UserError
from training.train import train


@pytest.fixture(scope="module")
def begun(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    run = tmp_path_factory.mktemp("runs") / "begun"
    train(options(small_data, run, epochs=1))
    return run


@pytest.fixture
def started(begun: Path, tmp_path: Path) -> Path:
    """A run of one epoch, to be continued or spoilt."""
    return Path(shutil.copytree(begun, tmp_path / "started"))


def set_rate(run: Path, rate: float) -> None:
    """Have the new layers of a run continue at another learning rate."""
    state = torch.load(last(run) / "training.pt", weights_only=True)
    state["optimizer"]["param_groups"][1]["initial_lr"] = rate
    torch.save(state, last(run) / "training.pt")


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained: Path, started: Path) -> None:
    train(make_options(resume=started, epochs=2, device="cpu"))
    straight, resumed = checkpoint.load(trained), checkpoint.load(started)
    assert all(torch.equal(resumed.model[name], tensor) for name, tensor in straight.model.items())
    assert resumed.model.keys() == straight.model.keys()
    momenta = [c.training["optimizer"]["state"] for c in (straight, resumed)]
    assert len(momenta[0]) == len(list(straight.model)) - sum(".running_" in n or ".num_b" in n for n in straight.model)
    assert all(torch.equal(momenta[1][key]["momentum_buffer"], m["momentum_buffer"]) for key, m in momenta[0].items())
    assert torch.equal(resumed.training["random"]["torch"], straight.training["random"]["torch"])
    assert metrics(started) == metrics(trained)


def test_a_run_begun_on_the_folder_goes_on_from_a_pack_bit_for_bit(
    small_data: Path, trained: Path, started: Path, tmp_path: Path
) -> None:
    pack(PackOptions("ilids-vid", tmp_path / "people.pack", small_data, check_counts=False))
    train(
        make_options(
            resume=started, data_root=tmp_path / "people.pack", epochs=2, workers=1, device="cpu", pictures=False
        )
    )
    straight, resumed = checkpoint.load(trained), checkpoint.load(started)
    assert all(torch.equal(resumed.model[name], tensor) for name, tensor in straight.model.items())
    assert metrics(started) == metrics(trained)
    apart = {name for name, value in resumed.config.items() if value != straight.config[name]}
    assert apart == {"settings"}
    resumed, straight = (of.config["settings"] for of in (resumed, straight))
    assert {name for name, value in resumed.items() if value != straight[name]} == {"data_root"}


def test_a_run_that_goes_on_otherwise_keeps_how_it_began(started: Path) -> None:
    began = checkpoint.load(started).config
    train(make_options(resume=started, epochs=2, channels_last=True, device="cpu", pictures=False))
    config = checkpoint.load(started).config
    assert config["settings"]["channels_last"]
    assert config["earlier"] == [{"to_epoch": 1, "channels_last": False}]
    assert "earlier" not in began


def test_a_run_that_pillow_resizes_is_evaluated_so(small_data: Path, tmp_path: Path, trained: Path) -> None:
    train(options(small_data, tmp_path / "run", resize="pillow", batches=1, epochs=1))
    first, *_, result = metrics(tmp_path / "run")
    assert (first["resize"], result["resize"], metrics(trained)[0]["resize"]) == ("pillow", "pillow", "device")
    evaluated = evaluate(EvaluateOptions(tmp_path / "run", device="cpu"))
    assert {**evaluated.record(), "kind": "result"} == result


def test_steps_logged_after_the_last_checkpoint_are_dropped_on_resuming(trained: Path, started: Path) -> None:
    with (started / "metrics.jsonl").open("a") as file:  # what a run killed in its second epoch leaves
        file.write(json.dumps({"kind": "step", "epoch": 2, "step": 3, "loss": 1.0}) + '\n{"kind": "st')
    train(make_options(resume=last(started), epochs=2, device="cpu", pictures=False))
    assert metrics(started) == metrics(trained)


def test_a_run_leaves_its_metrics_config_and_tensorboard_events(trained: Path, begun: Path) -> None:
    records = metrics(trained)
    assert [(record["kind"], record["epoch"]) for record in records] == [
        ("result", 0),
        *[("step", 1)] * 2,
        *[("step", 2)] * 2,
        ("result", 2),
    ]
    step = records[1]
    assert step["loss"] == pytest.approx(step["identity"] + step["video"] + step["part"])
    assert (records[-1]["probes"], records[-1]["chance"]) == (4, 0.25)
    config = json.loads((trained / "config.json").read_text())
    assert config["settings"]["people"] == 4
    default = backends.choose("auto", torch.device("cpu"))
    assert config["backends"] == {"refine": [default], "batch_hard": [default]}
    assert json.loads((last(trained) / "config.json").read_text()) == config
    board = EventAccumulator(str(trained)).Reload()
    assert {"train/loss", "train/data_wait", "evaluation/mAP"} <= set(board.Tags()["scalars"])
    for name in ("evaluation/ranking", "evaluation/gate"):
        assert [image.step for image in board.Images(name)] == [0, 4]
    tags = EventAccumulator(str(begun)).Reload().Tags()  # without pictures
    assert "evaluation/mAP" in tags["scalars"] and not tags["images"]


def test_too_few_people_lower_p_where_the_recipe_allows_it(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options(small_data, tmp_path / "run", people=8, batches=1, epochs=1))
    printed = capsys.readouterr().out
    assert "people in a batch (P): 4 instead of 8" in printed
    assert "\x1b" not in printed, "control characters, though this is no terminal"
    with pytest.raises(UserError, match="got 10, wanted at most 4,"):
        train(options(small_data, tmp_path / "strict", recipe="paper", weights="random", people=10))


def test_resuming_on_other_data_is_refused(small_data: Path, started: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(small_data, tmp_path / "data"))
    for frame in data.rglob("*_00008.png"):  # every tracklet has that many
        frame.unlink()
    with pytest.raises(UserError, match="resume: the run was trained on other data"):
        train(make_options(resume=started, data_root=data, epochs=2))


def test_a_loss_that_is_not_finite_names_step_part_and_clips_and_keeps_the_checkpoint(started: Path) -> None:
    set_rate(started, 1e30)
    before = (last(started) / "model.safetensors").read_bytes()
    with pytest.raises(UserError) as raised:
        train(make_options(resume=started, epochs=2, device="cpu"))
    assert str(raised.value).startswith("epoch 2, step 4: the identity loss is nan on cam")
    assert str(raised.value).count("/person") == 8
    assert str(raised.value).endswith("last good epoch: 1")
    assert (last(started) / "model.safetensors").read_bytes() == before


def test_weights_that_end_an_epoch_not_finite_are_not_saved(small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options(small_data, run, batches=1, epochs=1))
    set_rate(run, float("inf"))
    with pytest.raises(UserError, match=r"epoch 2, step 2: \S+ is not finite after its update; last good epoch: 1"):
        train(make_options(resume=run, epochs=2, device="cpu"))
    tensors = safetensors.torch.load_file(last(run) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def first_boxes(sequence: Path, here: Path, count: int = 12) -> Path:
    """The sequence with the first boxes of each track alone."""
    here.mkdir()
    for path in sequence.iterdir():
        (here / path.name).symlink_to(path)
    boxes: dict[str, list[str]] = {}
    for line in (sequence / "gt.txt").read_text().splitlines():
        boxes.setdefault(line.split(",")[1], []).append(line)
    (here / "gt.txt").unlink()
    (here / "gt.txt").write_text("\n".join(line for of_track in boxes.values() for line in of_track[:count]))
    return here


@pytest.mark.shared
def test_a_real_sequence_trains_and_ranks_the_people_who_return(shared_dir: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "pets"
    small = {"batches": 1, "epochs": 1, "compare_ops": False, "device": "cpu"}
    train(
        make_options(
            dataset="mot", data_root=first_boxes(shared_dir / "data" / "pets09-s2l1", data), output=run, **small
        )
    )
    result = metrics(run)[-1]
    assert (result["probes"], result["gallery"], result["protocol"]) == (7, 9, "single-shot")
    assert result["chance"] == pytest.approx(1 / 7)  # of the 7 x 9 pairs, each of the 9 visits makes one right


def test_bad_input_ends_the_command_in_one_line(small_data: Path, trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    for frame in data.rglob("cam1_*.png"):
        frame.write_bytes(b"not an image")
    for output, message in (
        (tmp_path / "run", "not a readable image"),
        (trained, "or --resume to continue the run in it"),
    ):
        arguments = ("--dataset", "ilids-vid", "--no-check-counts", "--data-root", data, "--output", output)
        status, _, printed = command("training.train", *arguments).end()
        assert status == 2
        assert printed.startswith("error: ")
        assert message in printed
        assert printed.count("\n") == 1


def test_an_interrupted_run_says_how_to_continue(small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (
        "--dataset",
        "ilids-vid",
        "--no-check-counts",
        "--data-root",
        small_data,
        "--output",
        run,
        "--batches",
        "1",
        "--epochs",
        "999",
    )
    running = command("training.train", *arguments)
    running.wait_for((run / "last").exists)
    os.kill(running.pid, signal.SIGINT)
    status, _, printed = running.end()
    assert status == 130
    epoch = checkpoint.load(run).training["epoch"]
    assert printed == f"interrupted; last good epoch: {epoch}; continue with --resume {run}\n"


def test_a_folder_that_holds_anything_is_no_output(small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-mine").mkdir(parents=True)
    with pytest.raises(
        UserError, match=f"output: {tmp_path / 'run'} is not an empty folder.* no checkpoint to resume$"
    ):
        train(options(small_data, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-mine"]


@pytest.mark.parametrize("weights", ["absent.pth", "x" * 300])
def test_a_start_that_fails_leaves_no_folder(small_data: Path, tmp_path: Path, weights: str) -> None:
    with pytest.raises(UserError, match="weights: there is no file"):
        train(options(small_data, tmp_path / "run", weights=weights))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["file", "file/run", "x" * 300, "/proc/none/run"])
def test_an_output_that_cannot_be_made_is_one_line(small_data: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output: \[Errno \d+\] .+: '.*'"):
        train(options(small_data, tmp_path / output))


def test_a_disk_that_fills_up_tells_how_to_continue(started: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(UserError) as raised:
            train(make_options(resume=started, epochs=2, device="cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(raised.value).startswith(f"output: {started}/checkpoint-0002")
    assert str(raised.value).endswith(f"; last good epoch: 1; continue with --resume {started}")
    train(make_options(resume=started, output=started, epochs=2, device="cpu", pictures=False))
    assert checkpoint.load(started).training["epoch"] == 2


def test_a_copied_checkpoint_starts_a_run_of_its_own_and_only_where_told(started: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(last(started), started / "best"))
    with pytest.raises(UserError, match=f"resume: {copy} is not the last checkpoint of a run, wanted --output"):
        train(make_options(resume=copy, epochs=2))
    train(make_options(resume=copy, output=tmp_path / "own", epochs=2, device="cpu", pictures=False))
    assert checkpoint.load(tmp_path / "own").training["epoch"] == 2
    assert checkpoint.load(started).training["epoch"] == 1


def test_a_run_that_has_all_its_epochs_says_so(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_options(resume=started, device="cpu"))
    assert "epoch 1 is reached already, of 1: nothing to train" in capsys.readouterr().out


def test_a_checkpoint_of_another_network_is_named_in_one_line(started: Path) -> None:
    state = torch.load(last(started) / "training.pt", weights_only=True)
    for momenta in state["optimizer"]["state"].values():
        momenta["momentum_buffer"] = torch.zeros(7)
    torch.save(state, last(started) / "training.pt")
    with pytest.raises(UserError, match=rf"{last(started)}/training\.pt: not of this training"):
        train(make_options(resume=started, epochs=2, device="cpu"))
    safetensors.torch.save_file({"weight": torch.zeros(2)}, last(started) / "model.safetensors")
    for use in (
        lambda: train(make_options(resume=started, epochs=2, device="cpu")),
        lambda: evaluate(EvaluateOptions(started, device="cpu")),
    ):
        with pytest.raises(UserError, match=f"{last(started)} does not fit this network: 1 unknown"):
            use()


def test_damaged_metrics_are_named_and_left_as_they_are(started: Path) -> None:
    path = started / "metrics.jsonl"
    damaged = path.read_text().replace("\n", "\n[]\n", 1)
    path.write_text(damaged)
    with pytest.raises(UserError, match=rf"{path}, line 2: damaged"):
        train(make_options(resume=started, epochs=2, device="cpu"))
    assert path.read_text() == damaged
