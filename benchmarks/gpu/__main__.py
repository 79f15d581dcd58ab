"""Measure everything on a GPU: parity first, then speed and memory, most important parts first.

    python3 -m benchmarks.gpu --results FOLDER
    TRITON_INTERPRET=1 python -m benchmarks.gpu --toy --results FOLDER    # without a GPU: toy shapes

Needs torch, triton, numpy and pytest. Each part runs in its own process group with a time limit; its findings are
written at once. FOLDER gets <gpu>-<date>.json with the rows and every part's findings, .log, -parity.xml, -rest.xml,
-autotune.json and -auto.json. Float32 is measured at PyTorch's defaults (convolutions in TF32, matmuls in fp32) and at
"high" (both in TF32), with parity against eager at the same precision. Exits with an error if a part fails, but not if
one is left out or the time is over.
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

from benchmarks.gpu.parts import PARTS, Context, LeftOutError
from benchmarks.gpu.results import Findings, Results
from benchmarks.harness.parity import format_error
from benchmarks.harness.results import ROOT, environment
from benchmarks.reports import table
from rru_fast import triton
from rru_fast.auto import processes

LEAST = 5  # seconds that must be left for a part to begin
SHOWN = 1500  # characters of a part's findings to print


def main(arguments: list[str] | None = None) -> None:
    """Run the parts, and print a table or the findings of each.

    Raises:
        SystemExit: an argument is wrong, or, at the end, a part has failed.
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
    found = environment(device) | {"op": "gpu"}
    if options.commit:
        found["commit"] = options.commit
    name = "toy" if options.toy else re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    results = Results(options.results.resolve(), name, found)
    with TemporaryDirectory() as scratch:
        for part in options.only or PARTS:
            left = options.seconds - (time.monotonic() - begin)
            _measure(part, results, device, options, left, Path(scratch))
            of_part, total = results.parts[part], time.monotonic() - begin
            print(f"== {part}: {of_part['ended']}, {of_part['seconds']} s, {total:.0f} s in all", flush=True)
    _summarize(results)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__, formatter_class=formatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of all files")
    parser.add_argument("--commit", help="commit that is measured (default: that of the checkout)")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; each runs every implementation once")
    parser.add_argument("--toy", action="store_true", help="run once, at toy shapes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stem", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _measure(
    name: str, results: Results, device: torch.device, options: argparse.Namespace, left: float, scratch: Path
) -> None:
    """Run a part, if it can run and has time, and add its findings to the results."""
    part, of_part = PARTS[name], results.parts.setdefault(name, {"seconds": 0, "ended": "is running"})
    if part.needs_gpu and device.type != "cuda":
        of_part["ended"] = "left out: needs a GPU"
    elif left < LEAST:
        of_part["ended"] = f"left out: {options.seconds:.0f} s are over"
    if of_part["ended"] != "is running":
        results.write()
        return
    # A toy has no limit of its own: the interpreter is slow.
    seconds = left if options.toy else min(part.seconds, left)
    findings, before = Findings(scratch / f"{name}.jsonl"), len(results.rows)
    log_begin = results.log.stat().st_size if results.log.exists() else 0

    def merge() -> None:
        if found := findings.new():
            for finding in found:
                results.add(name, finding)
            results.write()

    env = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache"), "PYTHONUNBUFFERED": "1", "RRU_FAST_CALIBRATE": "0"}
    if not part.interpreted:
        env.pop("TRITON_INTERPRET", None)
    begin = time.monotonic()
    words = command(name, findings.path, results.stem, seconds, options)
    with results.log.open("ab") as log:
        ended = processes.run(words, seconds, log, cwd=ROOT, env=env, poll=merge)
    merge()
    if ended != "ok" or of_part["ended"] == "is running":
        of_part["ended"] = ended
    if ended.startswith("stopped") and seconds == part.seconds:
        results.add(name, {"failed": ended})
    elif ended.startswith("exit") and "failed" not in of_part:
        results.add(name, {"failed": of_part.get("error", ended)})
    of_part["seconds"] = round(time.monotonic() - begin, 1)
    results.write()
    results.gather(scratch / "cache")
    _show(name, results, results.rows[before:])
    if "failed" in of_part:
        print(results.log.read_bytes()[log_begin:].decode(errors="replace")[-SHOWN:])


def command(name: str, findings: Path, stem: Path, seconds: float, options: argparse.Namespace) -> list[str]:
    """Return the command that runs a part in its own process."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--findings", str(findings), "--stem", str(stem)]
    words += ["--seconds", str(seconds), "--repeats", str(options.repeats)]
    return words + ["--toy"] * options.toy


def _run_part(options: argparse.Namespace) -> int:
    """Run a part in this process and write a line per finding; returns the exit status."""
    processes.end_with_parent()
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
        except Exception as error:  # any error: the other parts still run
            traceback.print_exc()
            note({"error": format_error(error)})
            return 1
    return int(failed)


def _show(name: str, results: Results, rows: list[table.Row]) -> None:
    """Print a part's rows, a table per section, and its other findings."""
    for title, of_title in groupby(rows, key=lambda row: f"{row['op']}, {row['mode']}"):
        print(f"\n{title}\n\n{table.markdown(list(of_title), hide=table.SHARED)}\n")
    found = {key: value for key, value in results.parts[name].items() if key not in ("ended", "seconds")}
    found |= {"environment": results.environment} if name == "environment" else {}
    if found:
        print(json.dumps(found, default=str)[:SHOWN])


def _summarize(results: Results) -> None:
    """Print where the results are, and each part that did not end well; exit with an error if one failed."""
    print(f"\nwrote {len(results.rows)} rows and {len(results.parts)} parts to {results.path}, the log next to it")
    for name, of_part in results.parts.items():
        if of_part["ended"] != "ok":
            print(f"  {name}: {of_part['ended']}")
    if failed := [f"{name}: {why}" for name, of_part in results.parts.items() for why in of_part.get("failed", [])]:
        raise SystemExit("failed:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
