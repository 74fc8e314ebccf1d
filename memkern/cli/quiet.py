"""Other libraries' progress bars and advice, turned off: they would bury what a command prints."""

from __future__ import annotations


def hush() -> None:
    """Errors only, from here on; before their classes are imported, some of which give advice then."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
