"""Writes docs/reference from the code; `--check` only says what is behind (exit status 1)."""

import argparse
import ast
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import click

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate_reference.py (make reference). -->\n"


def field_docs(cls: type) -> dict[str, tuple[str, str]]:
    """Field -> (annotation, docstring below it), of this class and its bases, bases first."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("tinkerbell."):
            continue
        tree = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = (ast.unparse(node.annotation), docstring(after))
    return found


def docstring(node: ast.stmt | None) -> str:
    """The text of a string that stands alone, in one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return one_line(node.value.value)
    return ""


def one_line(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def in_cell(text: str) -> str:
    """The text as a Markdown table cell."""
    return one_line(text).replace("|", "\\|")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a Markdown table, and an empty one after it."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(in_cell(value) for value in row) + " |"
    yield ""


def events_page() -> Iterator[str]:
    """Every kind of event with its facts."""
    from tinkerbell.events import kinds

    yield "# Events\n"
    yield (
        one_line("""The closed vocabulary of the log. Every event also has the envelope's columns (see
        [views](views.md)); arrays travel beside an event as its body. A request's position in the log is the
        id of its future; a result names its request as `causation`.""")
        + "\n"
    )
    groups = (
        ("Requests", "What a tenant asked for.", get_args(kinds.AnyRequest)),
        ("Results", "Exactly one for each request.", get_args(kinds.AnyResult)),
        ("The server's own", "What it did of its own accord.", ()),
    )
    grouped = {cls for _, _, classes in groups for cls in classes}
    rest = tuple(cls for cls in get_args(kinds.AnyEvent) if cls not in grouped)
    for title, lead, classes in groups:
        yield f"## {title}\n\n{lead}\n"
        for cls in classes or rest:
            yield f"### `{kinds.type_of(cls)}`\n"
            if meaning := re.sub(r"\s*Body: \w+\.$", "", one_line(cls.__doc__ or "")):
                yield meaning + "\n"
            body = kinds.BODY_OF.get(kinds.type_of(cls))
            if body is not None:
                fields = "; ".join(f"`{name}`: `{kind}`" for name, (kind, _) in field_docs(body).items())
                yield f"Body: {one_line(body.__doc__ or '')} {fields}\n"
            rows = [(f"`{name}`", f"`{kind}`", doc) for name, (kind, doc) in field_docs(cls).items()]
            if rows:
                yield from table(("fact", "type", "meaning"), rows)


def views_page() -> Iterator[str]:
    """Every view with its columns, and every table behind them."""
    from tinkerbell.events.tables import metadata
    from tinkerbell.events.views import VIEWS

    yield "# Views and tables\n"
    yield "The same on SQLite and Postgres. Ask the views; the tables are what they are made of and may change.\n"
    for name, view in VIEWS.items():
        yield f"## `{name}`\n\n{view.description}\n"
        yield from table(("column", "holds"), [(f"`{column}`", text) for column, text in view.columns.items()])
    yield "## Tables\n"
    for found in metadata.sorted_tables:
        yield f"### `{found.name}`\n\n{found.comment or ''}\n"
        rows = [(f"`{c.name}`", f"`{c.type}`".lower(), c.comment or "") for c in found.columns]
        yield from table(("column", "type", "holds"), rows)


def routes_page() -> Iterator[str]:
    """Every HTTP route, from the OpenAPI document."""
    schema = openapi()
    yield "# HTTP routes\n"
    yield (
        one_line("""`GET /schema` of a running server shows the same with every field. Bodies are JSON; errors are
        [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problems.""")
        + "\n"
    )
    problems: dict[str, str] = {}
    pages: list[str] = []
    for path, operations in sorted(schema["paths"].items()):
        for method, operation in operations.items():
            pages += route(method, path, operation, problems)
    yield from table(("status of a problem", "meaning"), sorted(problems.items()))
    yield from pages


def route(method: str, path: str, operation: dict[str, Any], problems: dict[str, str]) -> Iterator[str]:
    """One route; what its problems mean is added to `problems`."""
    yield f"## `{method.upper()} {path}`\n"
    yield one_line(f"{operation['summary']}. {operation.get('description', '')}") + "\n"
    if body := operation.get("requestBody"):
        yield f"Body: {type_name(next(iter(body['content'].values()))['schema'])}\n"
    rows = [
        (f"`{p['name']}`", p["in"], type_name(p["schema"]), p.get("description", ""))
        for p in operation.get("parameters", ())
    ]
    if rows:
        yield from table(("parameter", "in", "type", "meaning"), rows)
    mine = []
    for status, answer in sorted(operation["responses"].items()):
        if "application/problem+json" in answer.get("content", {}):
            problems[status] = answer["description"]
            mine.append(status)
        else:
            yield f"{status}: {answer_type(answer)}\n"
    if mine:
        yield f"Problems: {', '.join(mine)}\n"


def openapi() -> dict[str, Any]:
    """The OpenAPI document of the app. It needs an open log, so an empty one is made for it."""
    from tinkerbell.api.app import create_app
    from tinkerbell.config import Settings
    from tinkerbell.events import schema
    from tinkerbell.events.store import EventStore

    with tempfile.TemporaryDirectory() as directory:
        settings = Settings(data_dir=directory)
        schema.upgrade(settings.url)
        store = EventStore.open(settings)
        try:
            document: dict[str, Any] = create_app(settings, store).openapi_schema.to_schema()
        finally:
            store.close()
    return document


def type_name(schema: dict[str, Any]) -> str:
    """A JSON schema in a word or two."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "oneOf" in schema or "anyOf" in schema:
        return " or ".join(type_name(each) for each in schema.get("oneOf") or schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {type_name(schema['items'])}"
    return f"`{schema.get('type', 'any')}`"


def answer_type(answer: dict[str, Any]) -> str:
    """What a response holds."""
    for media_type, content in answer.get("content", {}).items():
        return type_name(content["schema"]) if media_type == "application/json" else f"`{media_type}`"
    return "no body"


def losses_page() -> Iterator[str]:
    """Every built-in loss with its formula, inputs and settings."""
    from tinkerbell.losses.registry import functions
    from tinkerbell.types import BUILTIN_LOSSES

    yield "# Losses\n"
    yield (
        one_line("""`loss` of a forward or forward_backward, by name, with its settings in `config`. At token t: log p_t
        is the logprob of the target under the weights that are trained, log q_t the input `logprobs` (of the policy
        that sampled), r_t = p_t / q_t, A_t the input `advantages`, w_t the input `weights`, 1 where not given. Each
        input has one number for each token of its datum. Where a token is masked and its r_t is not finite, because
        log q_t is a filler and no policy's, it counts as if that were 0. Losses are sums over tokens, never means.
        Metrics are sums, too: `num_tokens` counts, the others divided by `weight_sum` are weighted means. A sequence is
        a datum; none is ever cut.""")
        + "\n"
    )
    for name, function in functions().items():
        signature = BUILTIN_LOSSES[name]
        yield f"## `{name}`\n"
        for paragraph in inspect.cleandoc(function.__doc__ or "").split("\n\n"):
            yield one_line(paragraph) + "\n"
        inputs = [*signature.required, *signature.optional]
        masks = {key: "yes" if key in signature.masked_by else "no" for key in inputs}
        rows = [(f"`{key}`", "refused", masks[key]) for key in signature.required]
        rows += [(f"`{key}`", f"`{default:g}`", masks[key]) for key, default in signature.optional.items()]
        yield from table(("input", "where a datum has none", "0 masks its token"), rows)
        if signature.config:
            rows = [(f"`{key}`", f"`{default}`") for key, default in signature.config.items()]
            yield from table(("setting", "default"), rows)


def cli_page() -> Iterator[str]:
    """Every command with its options."""
    from tinkerbell.cli.main import cli

    yield "# Command line\n"
    yield from command(cli, "tinkerbell", None)


def command(cmd: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """A command and those below it."""
    ctx = click.Context(cmd, info_name=name, parent=parent)
    path = ctx.command_path
    arguments = " ".join(piece for piece in cmd.collect_usage_pieces(ctx) if piece)
    yield f"{'###' if parent else '##'} `{path}`\n"
    yield f"```\n{path} {arguments}\n```\n"
    text, _, example = inspect.cleandoc(cmd.help or "").partition("\b\n")
    yield text.strip() + "\n"
    if example:
        yield f"```sh\n{example.strip()}\n```\n"
    rows = []
    for param in cmd.get_params(ctx):
        record = param.get_help_record(ctx)
        if isinstance(param, click.Option) and record is not None and "--help" not in param.opts:
            rows.append((f"`{record[0]}`", record[1]))
    if rows:
        yield from table(("option", "meaning"), rows)
    if cmd.epilog:
        yield inspect.cleandoc(cmd.epilog) + "\n"
    if isinstance(cmd, click.Group):
        for below in cmd.list_commands(ctx):
            found = cmd.get_command(ctx, below)
            assert found is not None
            yield from command(found, below, ctx)


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "events.md": events_page,
    "views.md": views_page,
    "routes.md": routes_page,
    "losses.md": losses_page,
    "cli.md": cli_page,
}


def render(page: str) -> str:
    """The text of one page."""
    return NOTE + "\n".join(PAGES[page]()).rstrip() + "\n"


def main() -> int:
    """Write what is behind, or only name it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is behind")
    check = parser.parse_args().check
    REFERENCE.mkdir(exist_ok=True)
    behind = False
    for page in PAGES:
        file = REFERENCE / page
        text = render(page)
        if not file.exists() or file.read_text() != text:
            behind = True
            print(f"{'is behind' if check else 'wrote'}: {file.relative_to(REFERENCE.parent.parent)}")  # noqa: T201
            if not check:
                file.write_text(text)
    return int(check and behind)


if __name__ == "__main__":
    sys.exit(main())
