"""BFCL's own package as what this one is held against: its unchanged code, from an unpacked wheel.

Importing it would import the clients of some twenty vendors and parsers that are not asked for here. So packages that
are not installed are replaced by stand-ins while it is imported, and its table of models by one entry that says what it
says of OpenAI's models: dots in names become underscores.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

from qat.behavior.bfcl.literals import Language
from qat.behavior.bfcl.mutations import Calls
from qat.errors import UserError

_MODEL = "qat"
_NOT_NEEDED = {
    "dotenv", "filelock", "numpy", "openai", "overrides", "pandas", "tenacity", "tqdm", "tree_sitter",
    "tree_sitter_java", "tree_sitter_javascript",
}  # fmt: skip

Judge = Callable[[list[Any], Calls, list[Any], str], bool]
"""(functions, calls, answers, split) to whether they pass."""


class Reference(NamedTuple):
    """What is asked of the package.

    Attributes:
        judge: Its `ast_checker`.
        reply: (entry of the data file, answers, split, OpenAI message) to whether the reply passes, from the reading of
            the message on.
        tools: An entry of the data file to the OpenAI tools that are offered.
        literal: (language, text, type, type of the items) to the value.
    """

    judge: Judge
    reply: Callable[[Mapping[str, Any], list[Any], str, Mapping[str, Any]], bool]
    tools: Callable[[Mapping[str, Any]], list[Any]]
    literal: Callable[[Language, str, str, str | None], Any]


class _StandIns:
    """Finds what is not installed and not needed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in _NOT_NEEDED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> MagicMock:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is executed."""


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    finder = _StandIns()
    sys.path.insert(0, str(folder))
    sys.meta_path.append(finder)
    try:
        # The package makes folders for its results where it is imported.
        with TemporaryDirectory() as root, patch.dict(os.environ, BFCL_PROJECT_ROOT=root):
            yield
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, MagicMock)]:
            del sys.modules[name]


def load_reference(folder: Path) -> Reference:
    """The package from an unpacked wheel.

    Raises:
        UserError: It is not in the folder.
    """
    if not (folder / "bfcl_eval" / "eval_checker" / "ast_eval" / "ast_checker.py").is_file():
        raise UserError("BFCL's package is not here.", where=str(folder), remedy="unpack the wheel of bfcl-eval there")
    models = ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {_MODEL: SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
    sys.modules[models.__name__] = models
    with _importable(folder):
        enums, mappings, runner, utils, handler, tools = (
            importlib.import_module(f"bfcl_eval.{name}")
            for name in (
                "constants.enums",
                "constants.type_mappings",
                "eval_checker.eval_runner",
                "utils",
                "model_handler.api_inference.openai_completion",
                "model_handler.utils",
            )
        )
        java, javascript = (
            importlib.import_module(f"bfcl_eval.eval_checker.ast_eval.type_convertor.{name}_type_converter")
            for name in ("java", "js")
        )

    def language(split: str) -> str:
        return "JAVASCRIPT" if utils.is_js(split) else "JAVA" if utils.is_java(split) else "PYTHON"

    def judge(functions: list[Any], calls: Calls, answers: list[Any], split: str) -> bool:
        spoken = enums.Language[language(split)]
        return bool(runner.ast_checker(functions, calls, answers, spoken, split, _MODEL)["valid"])

    completions = handler.OpenAICompletionsHandler
    reader = SimpleNamespace(is_fc_model=True)
    reader.decode_ast = lambda *args, **named: completions.decode_ast(reader, *args, **named)

    def reply(entry: Mapping[str, Any], answers: list[Any], split: str, message: Mapping[str, Any]) -> bool:
        given = _response(message)
        found = completions._parse_query_response_FC(reader, given)["model_responses"]
        if utils.is_relevance_or_irrelevance(split):
            judged = runner._evaluate_single_relevance_entry(reader, entry["id"], found, entry, _MODEL, split)
        else:
            spoken, form = enums.Language[language(split)], enums.ReturnFormat[language(split)]
            judged = runner._evaluate_single_ast_entry(
                reader, entry["id"], found, answers, entry, _MODEL, split, spoken, form
            )
        return bool(judged["valid"])

    def offered(entry: Mapping[str, Any]) -> list[Any]:
        (hinted,) = utils.add_language_specific_hint_to_function_doc([copy.deepcopy(dict(entry))])
        style = enums.ModelStyle.OPENAI_COMPLETIONS
        return list(tools.convert_to_tool(hinted["function"], mappings.GORILLA_TO_OPENAPI, style))

    def literal(spoken: Language, text: str, declared: str, item: str | None) -> Any:
        read = java.java_type_converter if spoken == "java" else javascript.js_type_converter
        return read(text, declared, item)

    return Reference(judge, reply, offered, literal)


def _response(message: Mapping[str, Any]) -> SimpleNamespace:
    """The message as OpenAI's client gives it."""
    calls: Sequence[Mapping[str, Any]] | None = message.get("tool_calls")
    made = None if calls is None else [SimpleNamespace(id="", function=SimpleNamespace(**c["function"])) for c in calls]
    choice = SimpleNamespace(message=SimpleNamespace(content=message.get("content"), tool_calls=made))
    return SimpleNamespace(choices=[choice], usage=SimpleNamespace(prompt_tokens=0, completion_tokens=0))
