"""Make the Python environments: `python scripts/setup_env.py [toolkit] [engine]` (both without arguments)."""

import sys
from pathlib import Path

# Before anything else is imported: what follows is no syntax for an old interpreter.
if sys.version_info < (3, 11):
    sys.stderr.write("qat needs Python 3.11 or newer, this is %d.%d.\n" % sys.version_info[:2])
    sys.stderr.write("  remedy: install one and name it: make setup PYTHON=python3.11\n")
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.errors import ExitCode, UserError
from qat.serve import engine, environments


def main(names: list[str]) -> int:
    """Make the named environments, by default both; returns the exit code."""
    root = environments.project_root()
    known = {"toolkit": environments.toolkit(root), "engine": environments.engine(root, engine.engine_folder())}
    try:
        for name in names or list(known):
            environments.make(known[name], root, lambda line: print(line, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return ExitCode.USER_ERROR
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
