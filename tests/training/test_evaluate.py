from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tyro

from tests.helpers.small_runs import last, metrics, options
from tests.helpers.small_sets import write_mars, write_prid
from training.evaluate import Options as EvaluateOptions
from training.evaluate import evaluate
from training.runtime.errors import UserError
from training.train import train


def test_a_checkpoint_evaluates_as_the_run_did(trained: Path) -> None:
    for ops in ("fast", "reference"):
        result = evaluate(EvaluateOptions(trained, ops=ops, device="cpu")).record()
        assert {**result, "kind": "result", "ops": "fast"} == metrics(trained)[-1]


@pytest.mark.parametrize("rerank", ["equations", "published"])
def test_a_checkpoint_is_evaluated_by_the_protocol_and_reranking_asked_for(
    trained: Path, capsys: pytest.CaptureFixture[str], rerank: str
) -> None:
    as_it_was = metrics(trained)[-1]
    asked = f"--checkpoint {trained} --protocol torchreid --ties pessimistic --rerank {rerank} --device cpu"
    result = evaluate(tyro.cli(EvaluateOptions, args=asked.split())).record()
    assert (as_it_was["protocol"], as_it_was["ties"], as_it_was["reranked"]) == ("single-shot", "stable", False)
    assert (result["protocol"], result["ties"], result["reranked"]) == ("torchreid", "pessimistic", rerank)
    assert {name: result[name] for name in ("probes", "valid", "gallery", "junk")} == {
        "probes": 4,
        "valid": 4,
        "gallery": 4,
        "junk": 0.0,
    }
    shown = " ".join(capsys.readouterr().out.split())
    assert "torchreid, 4 queries (4 valid) in a gallery of 4" in shown
    assert f"re-ranked ({rerank})" in shown


def test_an_evaluation_is_written_with_all_that_it_came_from(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "result.json"
    result = evaluate(EvaluateOptions(trained, output=output, device="cpu"))
    assert capsys.readouterr().out.endswith(f"\nresult: {output}\n")
    written = json.loads(output.read_text())
    assert written["result"] == json.loads(json.dumps(result.record()))
    assert written["checkpoint"] == str(last(trained).resolve())
    assert written["config"] == json.loads((trained / "config.json").read_text())
    assert (written["config"]["settings"]["seed"], written["epoch"]) == (0, 2)
    assert written["environment"] == written["config"]["environment"]  # the same machine and commit
    assert written["environment"]["commit"] is not None
    with pytest.raises(UserError, match=r"result\.json is there already, wanted a new file"):
        evaluate(EvaluateOptions(trained, output=output, device="cpu"))


def test_prid_is_evaluated_by_the_people_it_was_trained_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write_prid(tmp_path / "data"), tmp_path / "run"
    prid: dict[str, Any] = {"dataset": "prid-2011", "prid": "official-27", "people": 2, "epochs": 1}
    train(options(data, run, **prid))
    capsys.readouterr()
    evaluate(EvaluateOptions(run, device="cpu"))
    assert "official-27" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["mars-official", "mars-standard-ap", "torchreid"])
def test_mars_is_trained_on_and_evaluated_by_each_of_its_protocols(protocol: str, tmp_path: Path) -> None:
    data, run = write_mars(tmp_path / "data"), tmp_path / "run"
    train(options(data, run, dataset="mars", people=2, epochs=1))
    assert metrics(run)[-1]["protocol"] == "mars-official"
    ranking = evaluate(EvaluateOptions(run, protocol=protocol, device="cpu")).ranking
    # Of 8 test tracklets 2 are junk of nobody; the 4 queries are of 2 people under 2 cameras each.
    assert (ranking.protocol, ranking.queries, ranking.gallery) == (protocol, 4, 2 if protocol == "torchreid" else 6)


def test_evaluating_on_people_trained_on_is_refused(trained: Path, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split 1: . of the people searched for have the numbers of people trained on"):
        evaluate(EvaluateOptions(trained, split=1, device="cpu"))
    (tmp_path / "moved").symlink_to(small_data)
    assert evaluate(EvaluateOptions(trained, data_root=tmp_path / "moved", device="cpu")).epoch == 2
    copy = Path(shutil.copytree(small_data, tmp_path / "copy"))
    with pytest.warns(UserWarning, match="if they are the same, they were not held out"):
        evaluate(EvaluateOptions(trained, data_root=copy, split=1, device="cpu"))


def test_another_dataset_is_evaluated_from_its_first_split(small_data: Path, tmp_path: Path) -> None:
    train(options(small_data, tmp_path / "run", split=3, batches=1, epochs=1))
    with pytest.raises(UserError, match=r"absent/seqinfo\.ini"):  # not that a MOT sequence has no split 3
        evaluate(EvaluateOptions(tmp_path / "run", dataset="mot", data_root=tmp_path / "absent", device="cpu"))
