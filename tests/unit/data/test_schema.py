from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.data.schema import PERSONA_FOLDER, argument_faults, load_persona, tool_faults
from qat.data.text import find_emoji
from qat.errors import UserError

PERSONA = {"name": "p", "system_prompt": "Be brief.", "facts": {"city": "Mysuru"}}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True), "utf-8")
    return path


def fault(path: Path, content: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_persona(write(path, content))
    return str(caught.value)


def test_every_shipped_persona_loads() -> None:
    names = [path.stem for path in PERSONA_FOLDER.glob("*.yaml")]
    assert "annie" in names
    for name in names:
        persona = load_persona(name)
        assert persona.name == name
        assert find_emoji(persona.system_prompt) == []


def test_annie_holds_what_the_suite_asks_for() -> None:
    annie = load_persona("annie")
    tools = {tool["function"]["name"] for tool in annie.tools}
    assert tools >= {
        "search_memory",
        "web_search",
        "fetch_webpage",
        "save_note",
        "read_notes",
        "run_code",
        "set_reminder",
        "get_weather",
    }
    rules = annie.system_prompt.split("<rules>\n")[1].split("\n</rules>")[0].splitlines()
    assert [line.split(".")[0] for line in rules] == [str(number) for number in range(1, len(rules) + 1)]
    for word in (
        "one or two",
        "markdown",
        "emoji",
        "question back",
        "Do not ask for permission",
        "do not remember",
        "Kannada",
    ):
        assert word in annie.system_prompt, word
    assert annie.facts["user"]["name"] in annie.system_prompt and annie.facts["user"]["city"] in annie.system_prompt
    for tool in annie.tools:
        parameters = tool["function"]["parameters"]
        assert parameters["additionalProperties"] is False
        assert all(field.get("description") and field.get("type") for field in parameters["properties"].values())


def test_reads_a_file_by_path(tmp_path: Path) -> None:
    persona = load_persona(write(tmp_path / "p.yaml", PERSONA))
    assert (persona.name, persona.system_prompt, persona.tools, persona.facts) == (
        "p",
        "Be brief.",
        [],
        {"city": "Mysuru"},
    )
    assert load_persona(str(tmp_path / "p.yaml")) == persona


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": None}, "name is missing"),
        ({"system_prompt": " "}, "system_prompt is missing or no text"),
        ({"system_prompt": "Be brief.\n"}, "begins or ends with white space"),
        ({"facts": [1]}, "facts is a list, not a mapping"),
        ({"tools": {"a": 1}}, "tools is a mapping, not a list"),
        ({"promt": "x"}, "unknown key 'promt'"),
        ({"systemprompt": "x"}, "did you mean 'system_prompt'?"),
    ],
)
def test_faults_of_a_persona(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in fault(tmp_path / "p.yaml", {**PERSONA, **change})


def test_all_faults_of_a_persona_at_once(tmp_path: Path) -> None:
    text = fault(tmp_path / "p.yaml", {"name": "", "facts": 3, "extra": 1})
    assert all(word in text for word in ("4 faults", "name", "system_prompt", "facts", "extra"))


def test_what_is_no_persona(tmp_path: Path) -> None:
    assert "holds a list" in fault(tmp_path / "p.yaml", [1])
    assert "cannot be read" in fault(tmp_path / "p.yaml", "a: [")
    with pytest.raises(UserError, match="cannot be read"):
        load_persona(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"no persona named 'anie'; did you mean 'annie'\?"):
        load_persona("anie")


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([{"name": "f"}], "tools[0] is not of the form"),
        ([tool(name="")], "tools[0].function.name is missing"),
        ([tool(), tool()], "a second tool named 'f'"),
        ([tool(description=3)], "description is not a text"),
        ([tool(parameters=[])], "parameters is a list, not a JSON schema"),
        ([tool(parameters={"type": "objekt"})], "no valid JSON schema: 'objekt' is not valid"),
        ([tool(parameters={"type": "string"})], 'must have "type": "object"'),
        ([tool(parameters={"type": "object", "required": ["a"]})], "not declared: 'a'"),
    ],
)
def test_faults_of_tools(tools: list[Any], expected: str) -> None:
    (found,) = tool_faults(tools)
    assert expected in found


def test_arguments(weather_tool: dict[str, Any]) -> None:
    def check(name: str, **arguments: Any) -> list[str]:
        return argument_faults(name, arguments, [weather_tool])

    assert check("get_weather", city="Mysuru", day="now") == []
    assert check("get_weather") == ["get_weather: 'city' is a required property at $"]
    assert check("get_weather", city=3) == ["get_weather: 3 is not of type 'string' at $.city"]
    assert check("get_weather", city="a", day="never")[0].startswith(
        "get_weather: 'never' is not one of ['now', 'tomorrow']"
    )
    assert check("get_weather", city="a", dya="now") == ["get_weather: unknown argument 'dya'; did you mean 'day'?"]
    assert check("weather")[0] == "calls 'weather', which is not offered (get_weather); did you mean 'get_weather'?"
    weather_tool["function"]["parameters"]["additionalProperties"] = True
    assert check("get_weather", city="a", extra=1) == []
