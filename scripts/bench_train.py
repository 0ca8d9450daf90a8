"""Measure training steps on one GPU, or on several against one, and write them to a JSON file.

python scripts/bench_train.py kernels --out docs/benchmarks/train_kernels.json
python scripts/bench_train.py layers --config CONFIG.json --out docs/benchmarks/train_layers13.json
python scripts/bench_train.py whole --config CONFIG.json --out docs/benchmarks/train_whole.json
python scripts/bench_train.py ranks --config CONFIG.json --layers 52 --gpus 1 2 --out ranks.json
python scripts/bench_train.py merge --run NAME FILE... --run NAME FILE... --out docs/benchmarks/train_ranks.json
"""

from __future__ import annotations

import argparse
import faulthandler
from pathlib import Path

from qat.train.bench import ranks
from qat.train.bench.run import PARTS, Shape, bench_kernels, bench_layers, bench_whole, markdown


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "layers", "whole", "ranks", "merge"))
    parser.add_argument("--config", type=Path, help="config.json of a Nemotron-H checkpoint; weights are random")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--layers", type=int, default=13, help="how many layers of it")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of `kernels`")
    parser.add_argument("--rounds", type=int, default=5, help="of four steps of each arm, one of ModelOpt's")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[
            "attention:4:2048:no:20",
            "attention:8:2048:yes:20",
            "experts:4:2048:no:20",
            "experts:8:2048:yes:20",
            "distillation:8:2048:yes:20",
        ],
        help="of the whole model, NAME:BATCH:LENGTH:RECOMPUTATION:STEPS; `packed` needs a call of its own",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="of ranks: counts to compare")
    parser.add_argument("--mode", nargs="+", choices=("replicate", "shard"), default=["replicate", "shard"])
    parser.add_argument("--limit", type=int, default=300, help="of ranks: seconds for one count in one mode")
    parser.add_argument(
        "--run", nargs="+", action="append", default=[], help="of merge: a run's name, and files of ranks"
    )
    parser.add_argument(
        "--stacks", type=int, default=0, help="for a run that hangs: seconds between dumps of all stacks; may end it"
    )
    args = parser.parse_args()
    if args.stacks:
        faulthandler.dump_traceback_later(args.stacks, repeat=True)
    if args.what == "ranks":
        places = (args.layers, args.gpus, args.mode, args.arms)
        ranks.bench_ranks(args.config, args.out, *places, args.limit, args.stacks)
        print(ranks.markdown(args.out))
        return
    if args.what == "merge":
        ranks.merge(args.out, {name: [Path(file) for file in files] for name, *files in args.run})
        print(ranks.markdown(args.out))
        return
    if args.what == "kernels":
        bench_kernels(args.out, args.parts)
    elif args.what == "layers":
        bench_layers(args.config, args.out, args.layers, [(batch, args.length) for batch in args.batch], args.rounds)
    else:
        bench_whole(args.config, args.out, [Shape.parse(text) for text in args.arms])
    if args.what != "kernels":
        print(markdown([args.out]))


if __name__ == "__main__":
    main()
