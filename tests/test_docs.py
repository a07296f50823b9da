"""Every public name is documented: ruff's D and DOC rules (pyproject.toml) hold the form, this the rest."""

import ast
import inspect
import re
from inspect import ismodule
from pathlib import Path
from types import FunctionType

import pytest

import implicit_attention
from implicit_attention import errors

PACKAGE = Path(implicit_attention.__file__).parent
PUBLIC = [name for name in implicit_attention.__all__ if not ismodule(getattr(implicit_attention, name))]
CLASSES = [name for name in PUBLIC if isinstance(getattr(implicit_attention, name), type)]
FUNCTIONS = (FunctionType, staticmethod, classmethod, property)


def ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "implicit_attention"


def documented(doc: str) -> set[str]:
    """Return the names that the Args and Attributes sections of a docstring in Google form describe."""
    found = set()
    for section in re.findall(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n|\n)*)", doc + "\n", flags=re.M):
        entries = re.findall(r"^ {4}([\w*, ]+?)(?: \(.*?\))?:", section, flags=re.M)
        found.update(name.strip(" *") for entry in entries for name in entry.split(","))
    return found


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def own_docs(cls: type, method: str | None = None) -> str:
    """Join what a class and its bases in this package say about themselves, or about one of their methods.

    What a base has written down, of fields or of a method that a subclass fills in, need not be repeated.
    """
    bases = [base for base in cls.__mro__ if ours(base)]
    if method is None:
        things = [thing for base in bases for thing in (base, vars(base).get("__init__"))]
    else:
        things = [vars(base).get(method) for base in bases]
    docs = [inspect.cleandoc(thing.__doc__) for thing in things if thing is not None and thing.__doc__]
    return "\n\n".join(docs)


def public_methods(cls: type) -> set[str]:
    return {
        name
        for base in cls.__mro__
        if ours(base)
        for name, member in vars(base).items()
        if not name.startswith("_") and isinstance(member, FUNCTIONS)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_documents_itself_and_its_parameters(name):
    thing = getattr(implicit_attention, name)
    doc = own_docs(thing) if isinstance(thing, type) else inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    if not (isinstance(thing, type) and issubclass(thing, Exception)):
        missing = parameters(thing) - documented(doc)
        assert not missing, f"{name} does not document {sorted(missing)}"


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_document_their_parameters(name):
    cls = getattr(implicit_attention, name)
    for method in sorted(public_methods(cls)):
        doc = own_docs(cls, method)
        assert doc, f"{name}.{method} has no docstring"
        if callable(getattr(cls, method)) and len(parameters(getattr(cls, method))) > 1:
            missing = parameters(getattr(cls, method)) - documented(doc)
            assert not missing, f"{name}.{method} does not document {sorted(missing)}"


# Functions such as `errors.bad_value`, which build the exception that their caller raises.
BUILDERS = {
    name: built.__name__
    for name, member in vars(errors).items()
    if inspect.isfunction(member)
    and isinstance(built := inspect.get_annotations(member, eval_str=True).get("return"), type)
    and issubclass(built, Exception)
}


def raised(function: ast.FunctionDef) -> set[str]:
    """Return the names of the exceptions that the body of a function raises itself."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            name = BUILDERS.get(name, name)
            found.update([name] if name.endswith(("Error", "Exception", "Warning")) else [])
    return found


def functions_with_sections():
    """Yield the public functions whose docstring goes on after its first line: those that have sections."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                doc = ast.get_docstring(node) or ""
                if "\n" in doc:
                    yield f"{path.relative_to(PACKAGE)}:{node.name}", node, doc


def test_raised_exceptions_are_documented():
    missing = [
        f"{where} raises {name}"
        for where, node, doc in functions_with_sections()
        for name in sorted(raised(node))
        if not re.search(rf"^ +\S*{name}:", doc, flags=re.M)
    ]
    assert not missing
