"""Progress bars and advice of other libraries, turned off: they would hide the output of a command."""

from __future__ import annotations


def hush() -> None:
    """Show only their errors from now on; called before the import of their classes, as some print advice then."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
