"""`engine install`, `engine status`, `engine stop`, `engine logs`: vLLM's own environment."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qat.commands.common import JsonOption, emit, exits, print_pairs
from qat.errors import ExitCode, UserError

app = typer.Typer(no_args_is_help=True, help="vLLM's own environment and the servers in it.")


@app.command("install")
@exits()
def install(json_: JsonOption = False) -> ExitCode:
    """Make vLLM's environment; does nothing where it is up to date."""
    from qat.serve import engine

    done = engine.install(lambda line: print(line, file=sys.stderr, flush=True))
    result = {"folder": str(engine.engine_folder()), "changed": done}
    emit(result, json_, lambda: print(f"{result['folder']}: {'installed' if done else 'up to date'}"))
    return ExitCode.DONE


@app.command("status")
@exits()
def status(json_: JsonOption = False) -> ExitCode:
    """Show the environment and the servers that run; exit 1 where it cannot serve."""
    from qat.serve import engine

    found = engine.status()
    servers = [
        {**server._asdict(), "memory_mib": round(memory, 1)}
        for server, memory in zip(found.servers, found.memory_mib, strict=True)
    ]
    result = {
        "folder": str(found.folder),
        "installed": found.installed,
        "problem": found.problem,
        "vllm": found.vllm,
        "torch": found.torch,
    }

    def text() -> None:
        print_pairs({name: value for name, value in result.items() if value != ""})
        for server in servers:
            print(f"server     {server['url']}  {server['model']}  process {server['pid']}, {server['memory_mib']} MiB")

    emit({**result, "servers": servers}, json_, text)
    return ExitCode.DONE if found.installed else ExitCode.FAIL


@app.command("stop")
@exits()
def stop(json_: JsonOption = False) -> ExitCode:
    """Stop every server that qat has started."""
    from qat.serve import engine

    stopped = [server._asdict() for server in engine.stop()]

    def text() -> None:
        for server in stopped:
            print(f"stopped {server['model']} at {server['url']}")
        if not stopped:
            print("no server runs")

    emit({"stopped": stopped}, json_, text)
    return ExitCode.DONE


@app.command("logs")
@exits()
def logs(
    lines: Annotated[int, typer.Option("--lines", help="Last lines of each log.", min=1)] = 40,
    json_: JsonOption = False,
) -> ExitCode:
    """Show the end of the logs of the servers that run."""
    from qat.serve import engine

    tails: dict[str, list[str]] = {}
    for path in engine.logs():
        try:
            tails[str(path)] = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        except OSError as error:
            raise UserError("a log cannot be read", where=str(path), value=error.strerror) from error

    def text() -> None:
        for path, tail in tails.items():
            print(f"==> {path}", *tail, sep="\n")
        if not tails:
            print("no server runs; a finished one's log lies in behavior/ of its run")

    emit(tails, json_, text)
    return ExitCode.DONE
