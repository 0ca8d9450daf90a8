"""Renders one chat template in a process of its own; started by `templates.py` as a program, never imported.

A chat template is a program that came with a download. Jinja's sandbox keeps it from Python's objects, but not from
using time and memory: `{% for i in range(99999) %}` nested three times, `'x' * 10**10` and `10**10**10` are all
allowed, and the last is one instruction that no thread can interrupt. Here the kernel enforces the limits, and what a
template can break is this process.

Reads one JSON object from standard input (`template`, `requests`, `characters`, `cpu_seconds`, `memory_bytes`) and
writes one to standard output: `fault` with its `value`, or `renderings` in the order of the requests. Knows only the
standard library and Jinja, so that it starts in a tenth of a second.

The environment (trimmed blocks, loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, the
`generation` tag) is the one that Transformers gives to chat templates; a test compares the two on real templates.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: remembers which characters of the text stand between the two."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.written = 0
        self.spans: list[tuple[int, int]] = []
        environment.extend(generation=self)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the tag into a call of `_mark` with what it encloses."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        self.spans.append((self.written, self.written + len(text)))
        return text


def _environment() -> tuple[ImmutableSandboxedEnvironment, _Generation]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    extension = next(e for e in environment.extensions.values() if isinstance(e, _Generation))
    return environment, extension


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _TooMuch(Exception):
    """The template used up its memory or wrote more than it may."""


def _render(template: jinja2.Template, generation: _Generation, variables: Any, characters: int) -> dict[str, Any]:
    pieces = []
    generation.written, generation.spans = 0, []
    try:
        for piece in template.generate(**variables):
            generation.written += len(piece)
            if generation.written > characters:
                raise _TooMuch(f"more than {characters} characters")
            pieces.append(piece)
    except MemoryError:
        raise _TooMuch("more memory than it may use") from None
    except _TooMuch:
        raise
    except Exception as error:  # whatever else a stranger's program raises is an answer
        return {"error": _describe(error)}
    return {"text": "".join(pieces), "spans": generation.spans}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}".removesuffix(": ")


def main() -> None:
    """Answer the one request on standard input."""
    request = json.load(sys.stdin)
    seconds, memory = request["cpu_seconds"], request["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, and SIGKILL a second later
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump(_answer(request), sys.stdout)


def _answer(request: Any) -> dict[str, Any]:
    environment, generation = _environment()
    try:
        template = environment.from_string(request["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"fault": "is no valid Jinja", "value": f"{_describe(error)} (line {error.lineno})"}
    except Exception as error:  # nested too deeply, too large a constant, …
        return {"fault": "cannot be compiled", "value": _describe(error)}
    try:
        return {
            "renderings": [
                _render(template, generation, variables, request["characters"]) for variables in request["requests"]
            ]
        }
    except _TooMuch as error:
        return {"fault": "writes without end", "value": str(error)}


if __name__ == "__main__":
    main()
