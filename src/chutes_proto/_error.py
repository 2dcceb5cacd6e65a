"""The root of all errors, in a module of its own so that the verifier can import it without the rest."""


class ChutesError(Exception):
    """Root of every error that this distribution raises on purpose (the tree is in ``chutes_proto.errors``)."""


ChutesError.__module__ = "chutes_proto"
