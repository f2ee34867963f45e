"""A group of commands that does something useful when it is called without one."""

from __future__ import annotations

import click


class DefaultGroup(click.Group):
    """Where the first word is none of its commands, the words are those of `list`."""

    default_name = "list"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_help = any(arg in ctx.help_option_names for arg in args[:1])
        words = [arg for arg in args if not arg.startswith("-")]
        if not is_help and not (words and words[0] in self.commands):
            args = [self.default_name, *args]
        return super().parse_args(ctx, args)
