"""`memkern explore`: a page in the browser that shows what a policy does to a prompt of one's own.

A prompt's tokens by role with their edits, images of the same seeds unpatched and patched, the attention mass per role
over the steps, and the code that reproduces what is shown. It listens on this machine alone by default.
"""

from .choice import Choice
from .images import Shown, show
from .serve import serve
from .tokens import Run, runs

__all__ = ["Choice", "Run", "Shown", "runs", "serve", "show"]
