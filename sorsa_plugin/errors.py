"""Every error that this package raises on purpose. A message says what was given, what was expected, what to do."""

from __future__ import annotations

from difflib import get_close_matches


class SORSAError(Exception):
    """Base class of this package's errors."""


class SORSAConfigError(SORSAError, ValueError):
    """An option of `SORSAConfig` has a value that cannot be honoured."""


class LoraOptionError(SORSAConfigError, TypeError):
    """An option of LoraConfig's that `SORSAConfig` cannot honour; a TypeError, as for any unknown option."""


class UnknownOptionError(SORSAConfigError, TypeError):
    """An option that `SORSAConfig` does not have; a TypeError, as for any unknown option."""


class RankError(SORSAConfigError):
    """The rank does not fit the weight."""


class UnsupportedLayerError(SORSAError, TypeError):
    """No plug-in knows how to adapt a module of this kind."""


class DecompositionError(SORSAError, RuntimeError):
    """A weight could not be factorised: it holds NaN or infinity, or no backend converged."""


class FactorsNotLoadedError(SORSAError, RuntimeError):
    """A saved config announced the adapter, and its tensors never arrived."""


class IncompleteAdapterError(SORSAError, RuntimeError):
    """An adapter file cannot be read, lacks tensors of a layer, or holds some that cannot be factors."""


class ForeignAdapterError(SORSAError, ValueError):
    """A directory or file holds no SORSA adapter, or one of another method."""


class OutputExistsError(SORSAError, FileExistsError):
    """The output exists already."""


class BaseMismatchError(SORSAError, RuntimeError):
    """The adapter was trained on another base model than the one at hand."""


class BaseFilesError(SORSAError, ValueError):
    """A base model's directory cannot be read tensor by tensor: files are absent, damaged, quantised or foreign."""


class NoAdaptedLayersError(SORSAError, ValueError):
    """The model has no trainable SORSA adapter, so there is nothing to regularize."""


class AttachError(SORSAError, RuntimeError):
    """The regularizer cannot be delivered through this optimizer."""


class NonFiniteGradientError(SORSAError, FloatingPointError):
    """The gradient of a factor holds NaN or infinity."""


class MergeError(SORSAError, RuntimeError):
    """An adapter cannot be merged into a weight that an engine holds, or adapters cannot be merged together."""


class FoldError(SORSAError, RuntimeError):
    """A layer cannot be folded or unfolded, or cannot do this while it is folded or its base stores residuals."""


class AdapterOptionsError(SORSAError, ValueError):
    """An adapter option of a recipe is unknown, contradicts another, or cannot be honoured."""


class PluginError(SORSAError, RuntimeError):
    """Plug-ins contradict each other."""


class MissingPackageError(SORSAError, ImportError):
    """An optional package is needed and not installed."""


class OldPackageError(MissingPackageError):
    """A package that is needed is installed in a version that is too old."""


def nearest(word: str, known: list[str]) -> str:
    """' Did you mean ...?' with the known word that is most similar, or that follows a prefix; empty if there is none.

    Args:
        word: what was given, such as "gama" or "sorsa_r".
        known: what could have been meant.
    """
    bare = str(word).partition("_")[2]
    matches = [bare] if bare in known else get_close_matches(str(word), known, 1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
