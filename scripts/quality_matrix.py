"""What FP4 costs on small bases, and what training against it gives back: the matrix of docs/quality_matrix.md.

python scripts/quality_matrix.py texts FOLDER --out TEXTS      (once, where the public files are)
python scripts/quality_matrix.py run --work WORK --texts TEXTS --workers 8 --seconds 1200      (again: goes on)
python scripts/quality_matrix.py report docs/benchmarks/quality_matrix.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from qat.matrix.design import BASES, SCALES
from qat.matrix.jobs import Place, jobs_of
from qat.matrix.schedule import run
from qat.matrix.table import assemble, render

RECORD = Path("docs/benchmarks/quality_matrix.json")


def main() -> int:
    """Exit 0 when everything is there, 3 when another call is needed, 1 where jobs failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = commands.add_parser("texts", help="pack the real texts of the second base")
    texts.add_argument("folder", type=Path, nargs="?", default=os.environ.get("QAT_REAL_DATA"))
    texts.add_argument("--out", type=Path, required=True)
    doing = commands.add_parser("run", help="train and measure; resumes")
    doing.add_argument("--work", type=Path, required=True, help="checkpoints and results")
    doing.add_argument("--record", type=Path, default=RECORD, help="where all results go as one file")
    doing.add_argument("--texts", type=Path, help="from `texts`; without it the second base reads generated text alone")
    doing.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    doing.add_argument("--scale", choices=SCALES, default="full")
    doing.add_argument("--workers", type=int, default=1, help="processes of each GPU")
    doing.add_argument("--devices", default="", help="GPUs as 0,1; by default those of CUDA_VISIBLE_DEVICES; none: CPU")
    doing.add_argument("--seconds", type=float, default=1e9, help="end after this time; call again to go on")
    doing.add_argument("--pretrain-seconds", type=float, default=140.0)
    showing = commands.add_parser("report", help="write the tables beside the record")
    showing.add_argument("record", type=Path, nargs="?", default=RECORD)
    options = parser.parse_args()
    if options.command == "texts":
        if options.folder is None:
            parser.error("name the folder of public files, or set QAT_REAL_DATA")
        from qat.matrix.texts import prepare

        prepare(Path(options.folder), options.out)
        return 0
    if options.command == "report":
        record = json.loads(options.record.read_text(encoding="utf-8"))
        options.record.with_suffix(".md").write_text(render(record), encoding="utf-8")
        return 0
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    named = options.devices or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [one for one in named.split(",") if one] or [None]
    place = Place(
        work=options.work.resolve(),
        scale=options.scale,
        texts=options.texts and options.texts.resolve(),
        pretrain_seconds=options.pretrain_seconds,
        processes=max(2, (os.cpu_count() or 2) - 8),
    )
    settings = f"--scale {options.scale} --workers {options.workers} --devices {named or 'CPU'}"
    command = f"python scripts/quality_matrix.py run --work WORK{' --texts TEXTS' * bool(options.texts)} {settings}"
    command += f" --pretrain-seconds {options.pretrain_seconds:g} --bases {' '.join(options.bases)}"
    jobs = jobs_of(tuple(options.bases))

    def say(line: str) -> None:
        print(line, flush=True)
        assemble(place, jobs, command, options.record)

    outcome = run(jobs, place, devices, options.workers, options.seconds, say)
    assemble(place, jobs, command, options.record)
    print(f"{len(outcome.done)} done, {len(outcome.failed)} failed, {len(outcome.left)} not run")
    for name in outcome.left:
        print(f"not run: {name}")
    return 1 if outcome.failed else 3 if outcome.left else 0


if __name__ == "__main__":
    raise SystemExit(main())
