"""Changes of rows as if time had passed: with SQL, and with new MACs, so that they are authentic in a sealed store."""

from __future__ import annotations

from attrs import frozen

from chutes_proto.store import _guard_sql
from chutes_proto.store import _sql as sql
from chutes_proto.store._guard import Guard, OfGuard
from chutes_proto.store._rows import GenerationRow, Scan


@frozen
class Turn(OfGuard[None]):
    """Change generations or facts by a statement."""

    statement: str

    def carry_out(self, guard: Guard) -> None:
        _ = guard.run(None, self.statement, ())
        if guard.of_store.key is None:
            return
        for name, value in guard.run(None, _guard_sql.READ_FACTS, ()):
            guard.of_store.note_fact(name, value)
        for row in sql.decode_rows(GenerationRow, guard.run(None, *sql.statement(Scan(GenerationRow)))):
            values = sql.encode(row)
            key = " AND ".join(f"{name} = ?" for name in GenerationRow.KEY)
            _ = guard.run(
                None, f"UPDATE generation SET mac = ? WHERE {key}", (guard.seal(GenerationRow, values), *values[:4])
            )
