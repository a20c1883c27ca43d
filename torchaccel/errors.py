"""The errors and warnings of torchaccel: each says what was given, what is allowed and what to do next."""


class TorchAccelError(Exception):
    """Base of every error that torchaccel raises on purpose."""


class OptionError(TorchAccelError, ValueError):
    """An argument has a wrong name, type, value or combination; the message lists what is allowed."""


class InputError(TorchAccelError, ValueError):
    """A call's inputs do not fit what the model was compiled for."""


class BackendError(TorchAccelError, RuntimeError):
    """A backend is not usable here, or does not honour the precision on this device."""


class BuildError(TorchAccelError, RuntimeError):
    """A backend could not build or load an engine; the message names the operators at fault where they are known."""


class DeviceMemoryError(BuildError):
    """Memory ran out while an engine was made ready; what was begun is released, and the module is as it was."""


class StaleWeightsError(TorchAccelError, RuntimeError):
    """The module's weights changed under `on_weight_change="raise"`; `refresh()` takes the new ones."""


class AccuracyError(TorchAccelError, RuntimeError):
    """An engine's outputs differ from the module's beyond the bound; the message has the figures of each output."""


class BackendWarning(UserWarning):
    """What was asked for is served by something else, or has a limit that the caller should know; it says why."""


class CacheWarning(UserWarning):
    """Something in the cache is damaged, or the cache cannot be used; it says what was found."""


class MeasurementWarning(UserWarning):
    """A measurement is less certain than it looks; it says why."""
