"""The stub of the native module says what the module says of itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import kvstore
from kvstore import _native

PACKAGE = Path(kvstore.__file__).parent
STUB = ast.parse((PACKAGE / "_native.pyi").read_text())


def test_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_names_match() -> None:
    functions = {node.name for node in STUB.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    variables = {ast.unparse(node.target) for node in STUB.body if isinstance(node, ast.AnnAssign)}
    public = {name for name in vars(_native) if not name.startswith("_")}
    assert functions == public
    assert all(hasattr(_native, name) for name in variables)


def test_signatures_match() -> None:
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            signature = getattr(_native, node.name).__nb_signature__[0][0]
            parsed = ast.parse(f"{signature}: ...").body[0]
            assert isinstance(parsed, ast.FunctionDef)
            assert ast.unparse(parsed.args) == ast.unparse(node.args), node.name
            assert parsed.returns is not None
            assert node.returns is not None
            assert ast.unparse(parsed.returns) == ast.unparse(node.returns), node.name


def test_members_of_classes_match() -> None:
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            described = {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}
            constants = {ast.unparse(member.target) for member in node.body if isinstance(member, ast.AnnAssign)}
            native = getattr(_native, node.name)
            assert {name for name in described if not name.startswith("_")} | constants == {
                name for name in vars(native) if not name.startswith("_")
            }
            assert ast.get_docstring(node), node.name
            assert native.__doc__, node.name
            for name, member in described.items():
                is_made_new = name == "__init__" and "__init__" not in vars(native)
                found = getattr(native, "__new__" if is_made_new else name)
                if not isinstance(found, property):
                    named = argument_names(found.__nb_signature__[-1][0])[1:]
                    assert named == [argument.arg for argument in member.args.args][1:], name


def argument_names(signature: str) -> list[str]:
    """The arguments that a native signature names; its annotations are no Python where they describe arrays."""
    arguments = signature.partition("(")[2].rpartition(")")[0].partition(") -> ")[0]
    while (plain := re.sub(r"\[[^\[\]]*\]", "", arguments)) != arguments:
        arguments = plain
    return [
        argument.partition(":")[0].strip() for argument in arguments.split(",") if argument.strip() not in ("/", "*")
    ]


def test_each_function_is_documented() -> None:
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name
            assert getattr(_native, node.name).__doc__, node.name
