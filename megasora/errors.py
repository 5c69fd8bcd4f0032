"""The one error for people."""


class MegaSoraError(Exception):
    """Its message names the file or key, the numbers and the remedy; entry points print it and exit with code 2."""
