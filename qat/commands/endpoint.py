"""`serve` and `chat`: a checkpoint behind a URL, and talking to one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qat.commands.common import (
    RUNS,
    JsonOption,
    RunOption,
    RunsDirOption,
    emit,
    existing_run,
    exits,
    run_recipe,
    terminable,
)
from qat.errors import ExitCode, UserError

_POLL_S = 1.0
Message = dict[str, Any]


@exits()
def serve(
    checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint folder; by default an arm of the run.")] = None,
    arm: Annotated[str | None, typer.Option("--arm", help="Arm of the run; by default the gate's candidate.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port on 127.0.0.1; 0 takes a free one.", min=0)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show vLLM's command line.")] = False,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    json_: JsonOption = False,
) -> ExitCode:
    """Serve a checkpoint with vLLM until Ctrl-C; prints the URL and a curl line once it is ready."""
    from qat import chain
    from qat.recipe.schema import ServeBlock
    from qat.serve.launch import build_command, choose_port, serve_checkpoint

    if checkpoint is not None:
        if arm is not None or run is not None:
            raise UserError("a checkpoint and an arm of a run are both named", remedy="name one of them")
        block, log = ServeBlock(), runs_dir / "serve.log"
    else:
        folder = existing_run(run, runs_dir)
        recipe = run_recipe(folder)
        names = [known.name for known in recipe.arms]
        wanted = arm if arm is not None else recipe.behavior.gate.candidate
        if wanted not in names:
            raise UserError(
                "the run has no such arm", where=str(folder), value=wanted, remedy=f"arms: {', '.join(names)}"
            )
        checkpoint = chain.checkpoint_of(folder, recipe, recipe.arm(wanted))
        block, log = chain.serve_block(recipe), folder / "behavior" / f"{wanted}.serve.log"
    if port is not None:
        block = block.model_copy(update={"port": port})
    if dry_run:
        command = build_command(checkpoint, block, choose_port(block.port))
        emit({"argv": command.argv, "env": command.env}, json_, lambda: print(command.shell()))
        return ExitCode.DONE
    with terminable(), serve_checkpoint(checkpoint, block, log) as endpoint:
        result = {**endpoint._asdict(), "checkpoint": str(checkpoint), "log": str(log)}
        emit(
            result,
            json_,
            lambda: print(f"{endpoint.url}/v1 serves {endpoint.model}; Ctrl-C stops it\n{endpoint.curl()}"),
        )
        sys.stdout.flush()
        _wait_for_end(endpoint.pid, log)
    return ExitCode.DONE


def _wait_for_end(pid: int, log: Path) -> None:
    """Return never while the server runs.

    Raises:
        UserError: The server ended by itself.
    """
    from qat.serve.registry import running

    while any(server.pid == pid for server in running()):
        time.sleep(_POLL_S)
    raise UserError(
        "vLLM ended by itself", where=str(log), remedy="its log says why; `qat engine stop` ends it like this"
    )


@exits()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this and end; without it a conversation begins.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Of the server; by default the one started last.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Name at the server; by default its first.")] = None,
    persona: Annotated[
        str | None, typer.Option("--persona", help="Whose system prompt and tools to send; by default the run's.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0.0)] = 0.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest reply.", min=1)] = 256,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    json_: JsonOption = False,
) -> ExitCode:
    """Talk to a served model as its persona's application would; an empty line ends the conversation."""
    from qat.data.schema import load_persona

    served = _server(url)
    who = load_persona(persona if persona is not None else run_recipe(existing_run(run, runs_dir)).persona)
    body: dict[str, Any] = {
        "model": model if model is not None else _first_model(served),
        "temperature": temperature,
        "max_tokens": max_tokens,
        "tools": who.tools,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    messages: list[Message] = [{"role": "system", "content": who.system_prompt}]
    if prompt is not None:
        reply = _ask(served, body, [*messages, {"role": "user", "content": prompt}])
        emit(reply, json_, lambda: print(_spoken(reply)))
        return ExitCode.DONE
    while line := _read_line():
        messages.append({"role": "user", "content": line})
        reply = _ask(served, body, messages)
        messages.append(reply)
        emit(reply, json_, lambda said=reply: print(_spoken(said)))  # type: ignore[misc]
        for call in reply.get("tool_calls") or []:
            # The application would run the tool: whoever chats plays it.
            result = _read_line(f"result of {call['function']['name']}> ")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if reply.get("tool_calls"):
            reply = _ask(served, body, messages)
            messages.append(reply)
            emit(reply, json_, lambda said=reply: print(_spoken(said)))  # type: ignore[misc]
    return ExitCode.DONE


def _server(url: str | None) -> str:
    from qat.serve.registry import running

    if url is not None:
        return url.rstrip("/").removesuffix("/v1")
    servers = running()
    if not servers:
        raise UserError("no server runs", remedy="start one with `qat serve`, or name one with --url")
    return servers[-1].url


def _first_model(url: str) -> str:
    models = _request("GET", f"{url}/v1/models")["data"]
    if not models:
        raise UserError("the server offers no model", where=url)
    return str(models[0]["id"])


def _ask(url: str, body: dict[str, Any], messages: list[Message]) -> Message:
    answer = _request("POST", f"{url}/v1/chat/completions", {**body, "messages": messages})
    message: Message = answer["choices"][0]["message"]
    kept = {name: message[name] for name in ("content", "tool_calls") if message.get(name)}
    return {"role": "assistant", "content": "", **kept}


def _request(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    import httpx

    try:
        answer = httpx.request(method, url, json=body, timeout=300.0)
    except httpx.HTTPError as error:
        raise UserError(
            "the server cannot be reached", where=url, value=str(error), remedy="is it running? qat serve"
        ) from error
    if answer.status_code != httpx.codes.OK:
        raise UserError(f"the server refused: HTTP {answer.status_code}", where=url, value=answer.text[:500])
    try:
        return answer.json()
    except json.JSONDecodeError as error:
        raise UserError("this is no OpenAI-compatible server", where=url, value=answer.text[:200]) from error


def _spoken(reply: Message) -> str:
    lines = [str(reply["content"])] if reply.get("content") else []
    for call in reply.get("tool_calls") or []:
        lines.append(f"-> {call['function']['name']}({call['function']['arguments']})")
    return "\n".join(lines) or "(empty reply)"


def _read_line(prompt: str = "> ") -> str:
    try:
        # The prompt belongs to the person, not to the output that a program may read.
        print(prompt, end="", file=sys.stderr, flush=True)
        return input().strip()
    except EOFError:
        print(file=sys.stderr)
        return ""
