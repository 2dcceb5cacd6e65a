"""The interface of a store: units, the script that each runs, and the function that drives it.

``chutes_proto.store.rows`` has the rows and the operations that a script yields, ``chutes_proto.store.sql`` both as SQL
for two dialects, ``chutes_proto.testing.store_suite`` the contract that a store of your own must pass.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.store._run import Script, Store, Unit, run_script
    from chutes_proto.store.rows import StoreOp
else:
    __getattr__ = lazily(
        globals(), {"chutes_proto.store._run": "Script Store Unit run_script", "chutes_proto.store.rows": "StoreOp"}
    )

__all__ = ["Script", "Store", "StoreOp", "Unit", "run_script"]
