"""Measure everything on a GPU: parity first, then speed and memory, in the order of worth.

    python3 -m benchmarks.gpu --results FOLDER
    TRITON_INTERPRET=1 python -m benchmarks.gpu --toy --results FOLDER    # without a GPU: toy shapes

Needs torch, triton, numpy and pytest. Each part runs in a process group of its own with a time limit; what it has found
is written as it is found. FOLDER gets <gpu>-<date>.json with the rows and every part's findings, .log, -parity.xml,
-rest.xml and -autotune.json. Float32 is measured at PyTorch's defaults (convolutions in TF32, matmuls in fp32) and at
"high" (both in TF32), parity at each against eager at the same. Exits with an error if a part fails, not if one is left
out or the time is over.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu import groups
from benchmarks.gpu.parts import PARTS, ROOT, Context, LeftOutError
from benchmarks.gpu.results import Findings, Results
from benchmarks.harness import measure
from benchmarks.implementations.refine import told
from benchmarks.reports import table
from rru_fast import triton

LEAST = 5  # seconds that a part must have left to begin
SHOWN = 1500  # characters of a part's findings that are printed


def main(arguments: list[str] | None = None) -> None:
    """Run the parts and print a table or the findings of each.

    Raises:
        SystemExit: the arguments do not fit, or, at the end, a part has failed.
    """
    options = _options(arguments)
    if options.part:
        sys.exit(_run_part(options))
    device = torch.device("cuda" if torch.cuda.is_available() and not triton.interpreted() else "cpu")
    if device.type == "cpu" and not options.toy:
        raise SystemExit("--toy: got False without a GPU, wanted one, or --toy with TRITON_INTERPRET=1")
    if (why := triton.missing()) is not None:
        raise SystemExit(f"triton: got a backend that does not serve: {why}")
    begin = time.monotonic()
    environment = measure.environment(device) | {"op": "gpu"}
    if options.commit:
        environment["commit"] = options.commit
    name = "toy" if options.toy else re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    results = Results(options.results.resolve(), name, environment)
    with TemporaryDirectory() as scratch:
        for part in options.only or PARTS:
            left = options.seconds - (time.monotonic() - begin)
            _measure(part, results, device, options, left, Path(scratch))
            own = results.parts[part]
            print(f"== {part}: {own['ended']}, {own['seconds']} s, {time.monotonic() - begin:.0f} s in all", flush=True)
    _summarize(results)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__, formatter_class=described)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of all files")
    parser.add_argument("--commit", help="commit that is measured (default: what git says)")
    parser.add_argument("--seconds", type=float, default=480, help="limit of all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; each runs every implementation once")
    parser.add_argument("--toy", action="store_true", help="toy shapes, once")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stem", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _measure(
    name: str, results: Results, device: torch.device, options: argparse.Namespace, left: float, scratch: Path
) -> None:
    """Run a part if it can run and has time, and put what it finds into the results."""
    part, own = PARTS[name], results.parts.setdefault(name, {"seconds": 0, "ended": "is running"})
    if part.needs_gpu and device.type != "cuda":
        own["ended"] = "left out: needs a GPU"
    elif left < LEAST:
        own["ended"] = f"left out: {options.seconds:.0f} s are over"
    if own["ended"] != "is running":
        results.write()
        return
    # A toy in the interpreter takes its time.
    seconds = left if options.toy else min(part.seconds, left)
    findings, before = Findings(scratch / f"{name}.jsonl"), len(results.rows)
    log_begin = results.log.stat().st_size if results.log.exists() else 0

    def merge() -> None:
        if found := findings.new():
            for finding in found:
                results.add(name, finding)
            results.write()

    env = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache"), "PYTHONUNBUFFERED": "1"}
    if not part.interpreted:
        env.pop("TRITON_INTERPRET", None)
    begin = time.monotonic()
    ended = groups.run(
        command(name, findings.path, results.stem, seconds, options), seconds, results.log, ROOT, env, merge
    )
    merge()
    if ended != "ok" or own["ended"] == "is running":
        own["ended"] = ended
    if ended.startswith("stopped") and seconds == part.seconds:
        results.add(name, {"failed": ended})
    elif ended.startswith("exit") and "failed" not in own:
        results.add(name, {"failed": own.get("error", ended)})
    own["seconds"] = round(time.monotonic() - begin, 1)
    results.write()
    results.gather_autotuned(scratch / "cache")
    _show(name, results, results.rows[before:])
    if "failed" in own:
        print(results.log.read_bytes()[log_begin:].decode(errors="replace")[-SHOWN:])


def command(name: str, findings: Path, stem: Path, seconds: float, options: argparse.Namespace) -> list[str]:
    """Return the command that runs a part in a process of its own."""
    given = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--findings", str(findings), "--stem", str(stem)]
    given += ["--seconds", str(seconds), "--repeats", str(options.repeats)]
    return given + ["--toy"] * options.toy


def _run_part(options: argparse.Namespace) -> int:
    """Run a part in this process, writing a line for each finding; the exit status."""
    groups.end_with_parent()
    device = torch.device("cuda" if torch.cuda.is_available() and not triton.interpreted() else "cpu")
    context = Context(device, options.toy, options.repeats, options.seconds, options.stem)
    torch.manual_seed(0)
    failed = False
    with options.findings.open("a") as file:

        def note(finding: dict[str, Any]) -> None:
            file.write(json.dumps(finding, default=str) + "\n")
            file.flush()

        try:
            for finding in PARTS[options.part].run(context):
                note(finding)
                failed = failed or "failed" in finding
        except LeftOutError as reason:
            note({"ended": f"left out: {reason}"})
        except Exception as error:  # whatever it is, the other parts go on
            traceback.print_exc()
            note({"error": told(error)})
            return 1
    return int(failed)


def _show(name: str, results: Results, rows: list[table.Row]) -> None:
    """Print a part's rows, a table a section, or its other findings."""
    for title, of_title in groupby(rows, key=lambda row: f"{row['op']}, {row['mode']}"):
        print(f"\n{title}\n\n{table.markdown(list(of_title), hide=table.SHARED)}\n")
    found = {key: value for key, value in results.parts[name].items() if key not in ("ended", "seconds")}
    found |= {"environment": results.environment} if name == "environment" else {}
    if found:
        print(json.dumps(found, default=str)[:SHOWN])


def _summarize(results: Results) -> None:
    print(f"\n{results.path}")
    for name, own in results.parts.items():
        if own["ended"] != "ok":
            print(f"  {name}: {own['ended']}")
    if failed := [f"{name}: {why}" for name, own in results.parts.items() for why in own.get("failed", [])]:
        raise SystemExit("failed:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
