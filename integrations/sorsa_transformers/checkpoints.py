"""Which checkpoint of a run can be resumed: the Trainer's own choice is the highest number, complete or not."""

from __future__ import annotations

from os import PathLike

from sorsa_plugin.extend import checkpoints, is_complete

__all__ = ["is_complete", "last_complete_checkpoint"]


def last_complete_checkpoint(output_dir: str | PathLike[str]) -> str | None:
    """The newest complete checkpoint in a Trainer's output directory; see `is_complete`.

    A checkpoint is left out if the run was killed while saving it, or if a file in it is truncated.

    Args:
        output_dir: the `output_dir` of the training arguments.

    Returns:
        A path for `trainer.train(resume_from_checkpoint=...)`; None, which starts anew, if there is none.
    """
    newest_first = reversed(checkpoints(output_dir).values())
    return next((str(path) for path in newest_first if is_complete(path)), None)
