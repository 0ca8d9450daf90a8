"""Pretrain the embedded tiny base model from scratch on one GPU, in pieces of at most nine minutes.

python scripts/build_tiny_base.py --work build/tiny_base --out data/tiny_base     (call again until it says "finished")
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from qat.train.tiny_base import Pretraining, pretrain


def main() -> int:
    """Exit 0 when finished, 3 when another call is needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny_base"), help="checkpoints and corpus")
    parser.add_argument("--out", type=Path, default=Path("build/tiny_base/model"), help="the finished model")
    parser.add_argument("--seconds", type=float, default=500, help="stop and save after this time")
    parser.add_argument("--steps", type=int, default=Pretraining.steps)
    parser.add_argument("--documents", type=int, default=Pretraining.documents)
    parser.add_argument("--batch", type=int, default=Pretraining.batch)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    settings = Pretraining(steps=args.steps, documents=args.documents, batch=args.batch)
    done = pretrain(
        settings,
        args.work,
        args.out,
        device=args.device,
        workers=os.cpu_count() or 1,
        seconds=args.seconds,
        say=lambda s: print(s, flush=True),
    )
    print("finished" if done else "not finished: call again", flush=True)
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
