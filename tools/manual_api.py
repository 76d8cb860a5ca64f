"""The API reference as Markdown for Sphinx: signatures, docstrings and fastcore's docments, one page per module

`module_page` gives the page of a module, `commands_page` that of the console commands. Types and defaults are those
of the imported objects, so what `@delegates` adds is there too.
"""
import argparse
import ast
import enum
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module

import fastai.vision.all  # noqa: F401  what a user imports first: all patches of fastai are in place
from fastcore.docments import docments
from fastcore.script import anno_parser
from house import decorated_patches

PACKAGE = "self_supervised_bt"
EMPTY = inspect.Parameter.empty


def module(name): return import_module(f"{PACKAGE}.{name}")


# Text

def type_text(annotation):
    "A type as a reader writes it: `int|tuple`, `Tensor`"
    if annotation is EMPTY or annotation is None: return ""
    if isinstance(annotation, str): return annotation
    text = inspect.formatannotation(annotation).replace(" | ", "|")
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def default_text(default):
    "A default as it is typed; what has no short source text goes by its name"
    if isinstance(default, enum.Enum): return f"{type(default).__name__}.{default.name}"
    if inspect.isroutine(default) or inspect.isclass(default): return default.__name__
    text = repr(default)
    return "..." if "<" in text or len(text) > 60 else text


def cell(text):
    "Text inside a table: one line, no bars"
    return " ".join(str(text).split()).replace("|", r"\|")


def code(text): return f"`{text}`" if text else ""


def code_cell(text):
    "Code inside a table; a bar is escaped there even in code"
    return cell(code(text))


def described(text):
    "A comment of a parameter as a sentence part: stars are no emphasis"
    return re.sub(r"(?<!\\)([*_])(?![^`]*`[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\1", cell(text or ""))


def defaults(f):
    "Defaults by the name of the parameter; those that a dataclass makes anew for each object are made once here"
    made = {field.name: field.default_factory() for field in fields(f) if field.default_factory is not MISSING} \
        if is_dataclass(f) else {}
    return {name: made.get(name, p.default) for name, p in inspect.signature(f).parameters.items()}


def signature_text(f, skip_first=False):
    "Names and defaults, without types: those are in the table"
    parameters = [p.replace(default=defaults(f)[p.name]) for p in inspect.signature(f).parameters.values()][skip_first:]
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parts, star = [], False
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL: star = True
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        default = "" if p.default is EMPTY else f"={default_text(p.default)}"
        parts.append(f"{marks.get(p.kind, '')}{p.name}{default}")
    return f"({', '.join(parts)})"


def parameter_table(f):
    "What each parameter is, and what is returned, from the comments beside them"
    rows = []
    for name, about in docments(f, full=True, args_kwargs=True).items():
        if name == "self": continue
        value = defaults(f).get(name, EMPTY)
        default = "" if value is EMPTY else default_text(value)
        if name == "return":
            if not about.docment and about.anno in (EMPTY, None): continue
            if is_dataclass(f): continue
            rows.append(("**returns**", code_cell(type_text(about.anno)), "", described(about.docment)))
        else:
            kind = type_text(about.anno)
            rows.append((code_cell(name), code_cell(kind), code_cell(default), described(about.docment)))
    return table(("parameter", "type", "default", "what it is"), rows) if rows else ""


def table(head, rows):
    "A table that the site's style turns into lists on a phone"
    lines = [head, ["---"]*len(head), *rows]
    return "\n".join(["::::{container} parameters", *(f"| {' | '.join(line)} |" for line in lines), "::::"])


# Objects

def directive(kind, title, body, options=(), fence="```"):
    "A MyST directive; `fence` grows where directives hold others"
    lines = [f"{fence}{{py:{kind}}} {title}", *(f":{o}" for o in options), "", body.strip(), fence]
    return "\n".join(lines)


def docstring(o): return inspect.cleandoc(o.__doc__ or "")


def joined(*parts): return "\n\n".join(p for p in parts if p)


def function_text(name, f, kind="function", skip_first=False, fence="```"):
    return directive(kind, name + signature_text(f, skip_first), joined(docstring(f), parameter_table(f)), fence=fence)


def public_methods(cls):
    "Methods and properties with a docstring that the class itself defines, in the order of its source"
    own = [(name, o) for name, o in vars(cls).items() if not name.startswith("_")]
    return [(name, o) for name, o in own
            if (inspect.isfunction(o) or isinstance(o, (property, classmethod, staticmethod))) and o.__doc__]


def method_text(name, o):
    if isinstance(o, property): return directive("property", name, docstring(o), fence="```")
    static = isinstance(o, (classmethod, staticmethod))
    return function_text(name, o.__func__ if static else o, "method", not isinstance(o, staticmethod))


def class_text(name, cls):
    "A class: its constructor's parameters, its base of this package, its documented methods"
    bases = [f"Extends `{b.__name__}`." for b in cls.__bases__ if b.__module__.startswith(PACKAGE)]
    if issubclass(cls, enum.Enum):
        members = table(("member", "value"), [(code(m.name), code_cell(repr(m.value))) for m in cls])
        return directive("class", name, joined(docstring(cls), members), fence="````")
    documented = cls if is_dataclass(cls) else cls.__init__
    methods = [method_text(n, o) for n, o in public_methods(cls)]
    body = joined(docstring(cls), *bases, parameter_table(documented), *methods)
    return directive("class", name + signature_text(cls), body, fence="````")


def data_text(name, value):
    "A constant: what it holds"
    body = f"A `{type(value).__name__}`."
    if isinstance(value, dict): body = "A dictionary with the keys " + ", ".join(f"`{k!r}`" for k in value) + "."
    return directive("data", name, body)


def object_text(name, o):
    if inspect.isclass(o): return class_text(name, o)
    if callable(o): return function_text(name, o)
    return data_text(name, o)


def new_methods(name):
    "Methods that a module adds to a class of fastai: ('Learner.fit_recipe', function); wraps of existing ones left out"
    for dotted in decorated_patches(ast.parse(inspect.getsource(module(name)))):
        cls, method = dotted.split(".")
        target = getattr(fastai.vision.all, cls, None)
        f = getattr(target, method, None)
        if f is None or method.startswith("_") or hasattr(target, f"_orig_{method}") or not f.__doc__: continue
        yield dotted, f


def named_in_full(name, pages):
    "Names outside `__all__` that pages type with their module: `zoo.get_model`"
    found = re.findall(rf"(?<![\w./]){name}\.([a-z]\w+)", pages)
    mod = module(name)
    own = [n for n in dict.fromkeys(found) if getattr(getattr(mod, n, None), "__module__", "") == mod.__name__]
    return [n for n in own if n not in mod.__all__ and callable(getattr(mod, n)) and getattr(mod, n).__doc__]


def module_page(name, how_it_works, pages=""):
    "The page of a module; `pages` is the text in which names are looked for that are typed with their module"
    mod = module(name)
    public = [object_text(n, getattr(mod, n)) for n in mod.__all__]
    methods = [directive("method", dotted + signature_text(f, True), joined(docstring(f), parameter_table(f)))
               for dotted, f in new_methods(name)]
    in_full = [object_text(n, getattr(mod, n)) for n in named_in_full(name, pages)]
    imports = f"`from {PACKAGE}.{name} import ...`" + (f", or `from {PACKAGE}.all import *`." if public else "")
    return joined(f"# {name}", mod.__doc__, f"{imports} How it works, with examples: [{name}]({how_it_works}).",
                  f"```{{py:module}} {PACKAGE}.{name}\n```", *public,
                  *(["## Methods of fastai's classes", *methods] if methods else []),
                  *([f"## Typed as `{name}.NAME`", *in_full] if in_full else []),
                  "" if public or methods or in_full else "It has no names for users, it serves other modules.") + "\n"


# Commands

def parser_of(command):
    "The argument parser of a console command, as `call_parse` makes it"
    positional = inspect.getclosurevars(command).nonlocals.get("pos")
    return anno_parser(command.__wrapped__, command.__name__, positional)


def option_row(action, default):
    "One option of a command: how it is typed, its default, what it is"
    flag = isinstance(action, argparse._StoreTrueAction)
    name = ", ".join(action.option_strings) or action.dest.upper()
    value = "" if flag or not action.option_strings else f" {action.dest.upper()}"
    shown = "" if any(default is o for o in (None, EMPTY, False)) else code_cell(default)
    help_text = re.sub(r"\s*\(default: .*\)$", "", action.help or "")
    return code_cell(name + value), shown, described(help_text)


def examples_apart(text):
    "A docstring as (what the command does, its examples); they stand behind `Example:` or `Examples:`"
    about, _, examples = re.sub(r"\s+", " ", text).partition(" Example")
    return about, [e.strip() for e in examples.lstrip("s").lstrip(":").split(";") if e.strip()]


def command_text(name):
    "A console command: what it does, and a table of its options"
    command = getattr(module("cli"), name)
    parameters = inspect.signature(command).parameters
    about, examples = examples_apart(docstring(command))
    actions = [a for a in parser_of(command)._actions if a.help != argparse.SUPPRESS and a.dest in parameters]
    rows = [option_row(a, parameters[a.dest].default) for a in actions]
    positional = [a.dest.upper() for a in actions if not a.option_strings]
    usage = " ".join([name, *positional, "[options]"])
    shown = "\n".join(re.sub(r"^.*?: (?=bt_|torchrun)", "", e) for e in examples)
    return joined(f"({name})=\n## `{name}`", about.rstrip(".") + ".", f"```text\n{usage}\n```",
                  f"```sh\n{shown}\n```" if shown else "",
                  table(("option", "default", "what it is"), rows))


def commands_page(how_it_works):
    "The page of the console commands"
    cli = module("cli")
    return joined("# Commands", cli.__doc__, f"`COMMAND --help` prints the same. How they work: [cli]({how_it_works}).",
                  *map(command_text, cli.__all__)) + "\n"
