"""Applies the folds' changes with SQL, a few statements for a whole group of events."""

from collections.abc import Iterable

from tinkerbell.events.projections import KEYS, Add, Change, Key, Put, Row, Set
from tinkerbell.events.statements import Statements
from tinkerbell.events.tables import PROJECTIONS


class _Pending:
    """All the changes to one row, in one."""

    __slots__ = ("add", "put", "set")

    def __init__(self) -> None:
        self.put: Row | None = None
        self.set: Row = {}
        self.add: Row = {}

    def absorb(self, change: Change) -> None:
        match change:
            case Put():
                self.put, self.set, self.add = dict(change.values), {}, {}
            case Set():
                (self.set if self.put is None else self.put).update(change.values)
            case Add():
                target = self.add if self.put is None else self.put
                for column, value in change.values.items():
                    target[column] = target.get(column, 0) + value


def project(statements: Statements, changes: Iterable[Change]) -> None:
    """Apply changes in order, in the caller's transaction."""
    rows: dict[tuple[str, Key], _Pending] = {}
    for change in changes:
        rows.setdefault((change.table, change.key), _Pending()).absorb(change)
    groups: dict[tuple[str, str, tuple[str, ...]], list[Row]] = {}
    for (table, key), pending in rows.items():
        names = dict(zip(KEYS[table], key, strict=True))
        for how, values in (("put", pending.put), ("set", pending.set), ("add", pending.add)):
            if values:
                groups.setdefault((table, how, tuple(sorted(values))), []).append({**names, **values})
    for (name, how, _), group in groups.items():
        if how == "set":
            statements.update(PROJECTIONS[name], group)
        else:
            statements.insert(PROJECTIONS[name], group, "add" if how == "add" else "replace")
