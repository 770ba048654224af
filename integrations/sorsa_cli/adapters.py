"""`sorsa adapters`: prints the words that `adapter:` can be, and the options beside it."""

from __future__ import annotations

import typer


def adapters(context: typer.Context) -> None:
    """List the words that `adapter:` can be in a recipe, those of plug-ins too, and the options that they share."""
    from sorsa_plugin.recipes.setup_adapter import VOCABULARY, registered_adapters

    formatter = context.make_formatter()
    with formatter.section("adapter"):
        formatter.write_dl([(word, found.summary) for word, found in sorted(registered_adapters().items())])
    with formatter.section("Options beside it"):
        formatter.write_dl(list(VOCABULARY.items()))
    formatter.write_paragraph()
    formatter.write_text(
        "Any other method that PEFT registers is a word too, by its name there. Options of one method go into a block "
        "named after it, and are the fields of its PEFT config, such as sorsa: {gamma: 4.0e-4}."
    )
    typer.echo(formatter.getvalue().rstrip())
