"""The interface of a store: units, the script that each runs, and the function that drives it.

A script yields operations, each a `StoreOp`. `statement` says one as SQL for a database of the tables that `schema`
makes, `for_driver` has the parameter marks of that database, and `decode` makes the reply of the rows that it returned.
``chutes_proto.testing.store_suite`` is the contract that a store of your own must pass.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.store._rows import StoreOp
    from chutes_proto.store._run import Script, Store, Unit, run_script
    from chutes_proto.store._schema import schema
    from chutes_proto.store._sql import decode, for_driver, statement
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.store._rows": "StoreOp",
            "chutes_proto.store._run": "Script Store Unit run_script",
            "chutes_proto.store._schema": "schema",
            "chutes_proto.store._sql": "decode for_driver statement",
        },
    )

__all__ = ["Script", "Store", "StoreOp", "Unit", "decode", "for_driver", "run_script", "schema", "statement"]
