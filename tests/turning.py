"""Changes of rows as if time had passed: with SQL, and with new MACs, so that they are authentic in a sealed store."""

from __future__ import annotations

from attrs import frozen

from chutes_proto.store import sql
from chutes_proto.store._guard import Guard, _OfSeal
from chutes_proto.store.rows import GenerationRow, Scan


@frozen
class Turn(_OfSeal[None]):
    """Change generations or facts by a statement."""

    statement: str

    def carry_out(self, guard: Guard) -> None:
        _ = guard._run(None, self.statement, ())
        if not guard.state[0]:
            return
        for name, value in guard._run(None, sql.READ_FACTS, ()):
            guard.fact(name, value)
        for row in sql.decode_rows(GenerationRow, guard._run(None, *sql.statement(Scan(GenerationRow)))):
            values = sql.encode(row)
            key = " AND ".join(f"{name} = ?" for name in GenerationRow.KEY)
            _ = guard._run(
                None, f"UPDATE generation SET mac = ? WHERE {key}", (guard._seal(GenerationRow, values), *values[:4])
            )
