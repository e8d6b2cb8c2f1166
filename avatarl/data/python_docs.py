"""The documentation that every Python installation carries, as documents: the corpus that needs no download.

It has the topics of the language reference that ``help()`` shows, and the docstrings of the standard library. Modules
written in Python are parsed, never imported; only C modules, which have no source, are imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sysconfig
import tokenize
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST_DOCSTRING_CHARACTERS = 40

LEFT_OUT_FOLDERS = set("__pycache__ dist-packages idlelib lib2to3 site-packages test tests turtledemo".split())

# Named one by one, because which modules are written in C or built in differs between installations.
C_MODULES = (
    "_bisect _bz2 _codecs _collections _csv _ctypes _datetime _decimal _elementtree _functools _hashlib _heapq _io "
    "_json _lzma _operator _pickle _random _signal _socket _sqlite3 _sre _ssl _struct _thread array atexit binascii "
    "builtins cmath errno fcntl gc itertools marshal math mmap posix pyexpat resource select sys syslog termios time "
    "unicodedata zlib"
).split()

# Modules that everybody knows by another name than their own without the leading underscore.
PUBLIC_NAMES = {
    "_elementtree": "xml.etree.ElementTree",
    "_sre": "re",
    "_thread": "_thread",
    "builtins": "",
    "posix": "os",
    "pyexpat": "xml.parsers.expat",
}


def python_documents() -> Iterator[str]:
    """Yield the documentation of the running Python in a fixed order, one topic or docstring a document.

    A docstring is headed by the name and arguments that it describes. Docstrings of fewer than 40 characters, and
    those already seen under another name, are left out. About 2 MB; the text differs between versions of Python.
    """
    from pydoc_data.topics import topics

    for text in dict.fromkeys(text.strip() for _, text in sorted(topics.items())):
        yield text + "\n"
    seen = set()
    for heading, docstring in sorted({*_library_docstrings(), *_c_docstrings()}):
        docstring = inspect.cleandoc(docstring).strip()
        is_unicode = docstring.encode("utf-8", "ignore").decode("utf-8") == docstring
        if len(docstring) >= SHORTEST_DOCSTRING_CHARACTERS and docstring not in seen and is_unicode:
            seen.add(docstring)
            yield f"{heading}\n\n{docstring}\n"


# --- modules written in Python --------------------------------------------------------------------------------------


def _library_docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(library):
        # A folder such as `config-3.12-x86_64` is no package: its name could not be imported.
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in LEFT_OUT_FOLDERS]
        for path in (Path(folder, name) for name in names):
            if path.suffix != ".py" or not path.stem.isidentifier():
                continue
            try:
                with tokenize.open(path) as file, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
                    tree = ast.parse(file.read())
            except (SyntaxError, UnicodeDecodeError):
                continue  # distributions add templates and files for other versions of Python
            name = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            if docstring := ast.get_docstring(tree, clean=False):
                yield f"module {name}", docstring
            yield from _member_docstrings(tree, name)


def _member_docstrings(parent: ast.Module | ast.ClassDef, parent_name: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            name = f"{parent_name}.{node.name}"
            bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
            heading = f"class {name}({bases})" if bases else f"class {name}"
            yield from _member_docstrings(node, name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            heading = f"{parent_name}.{node.name}({ast.unparse(node.args)}){returns}"
        else:
            continue
        if docstring := ast.get_docstring(node, clean=False):
            yield heading, docstring


# --- modules written in C -------------------------------------------------------------------------------------------


def _c_docstrings() -> Iterator[tuple[str, str]]:
    for module_name in C_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue  # not on this platform, or not compiled into this Python
        public_name = PUBLIC_NAMES.get(module_name, module_name.lstrip("_"))
        prefix = f"{public_name}." if public_name else ""
        if isinstance(module.__doc__, str):
            yield f"module {public_name or module_name}", module.__doc__
        # A copy, because asking for a signature can add to the module's names.
        for name, member in list(vars(module).items()):
            if isinstance(member, type) and member.__module__ in (public_name, module_name):
                yield from _c_class_docstrings(member, prefix + name)
            elif isinstance(member, types.BuiltinFunctionType) and member.__doc__:
                yield prefix + name + _signature(member), member.__doc__


def _c_class_docstrings(kind: type, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(kind.__doc__, str):
        yield f"class {name}", kind.__doc__
    for member_name, member in vars(kind).items():
        docstring = getattr(member, "__doc__", None)
        if isinstance(docstring, str) and inspect.isroutine(member):
            yield f"{name}.{member_name}{_signature(member)}", docstring
        elif isinstance(docstring, str) and inspect.isdatadescriptor(member):
            yield f"{name}.{member_name}", docstring


def _signature(function: object) -> str:
    try:
        signature = str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(...)"  # many C functions carry none that can be read
    # A default shown by its address would differ from run to run.
    return "(...)" if " at 0x" in signature else signature
