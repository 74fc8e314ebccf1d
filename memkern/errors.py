"""The error and the warning for a prompt that would go through unmitigated."""


class UnmitigatedError(RuntimeError):
    """A patched pipeline was about to use a prompt that it cannot edit (`on_unknown="raise"`)."""


class UnmitigatedWarning(UserWarning):
    """A patched pipeline used a prompt that it could not edit (`on_unknown="warn"`)."""
