"""Options that several commands have, those of a cache among them."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from ..engine.policy import CachePolicy


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Registry name (see `mixkv models`), a folder, a .gguf file, hf:org/name, or pypi:package.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _unless(default: object) -> str:
    """What help says of an option that changes a field of the policy."""
    return f"{default}, or as --policy says"


Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="full, f16, balanced, small, tiny; k4v2; words such as 'old=k4c/v2t32 rot=k'; or a .toml file.",
        show_default="balanced",
    ),
]
Window = Annotated[
    int | None, typer.Option(help="Recent tokens that every query sees at high precision.", show_default=_unless(128))
]
Sinks = Annotated[int | None, typer.Option(help="First tokens that stay at high precision.", show_default=_unless(4))]
KBits = Annotated[int | None, typer.Option(help="Bits of old keys: 2, 3, 4, 8, 16 or 32.", show_default=_unless(4))]
VBits = Annotated[int | None, typer.Option(help="Bits of old values: 2, 3, 4, 8, 16 or 32.", show_default=_unless(4))]
Tile = Annotated[int | None, typer.Option(help="Tokens quantized together: 32, 64 or 128.", show_default=_unless(64))]
Dense = Annotated[
    str | None, typer.Option(help="Type of sinks and recent tokens: f16, bf16 or f32.", show_default=_unless("f16"))
]
KAxis = Annotated[
    str | None, typer.Option(help="Scales of old keys: by channel or token.", show_default=_unless("channel"))
]
VAxis = Annotated[
    str | None, typer.Option(help="Scales of old values: by channel or token.", show_default=_unless("token"))
]
KGroup = Annotated[
    int | None, typer.Option(help="Channels of old keys a scale by token.", show_default=_unless("0: up to 64"))
]
VGroup = Annotated[
    int | None, typer.Option(help="Channels of old values a scale by token.", show_default=_unless("0: up to 64"))
]
Rotate = Annotated[
    str | None, typer.Option(help="What is kept Hadamard-rotated: none, k, v or kv.", show_default=_unless("kv"))
]
Scales = Annotated[
    str | None, typer.Option(help="Scales of codes: fit, by least squares, or range.", show_default=_unless("fit"))
]
Rollback = Annotated[int | None, typer.Option(help="Tokens that the session can go back.", show_default=_unless(0))]


class CacheOptions(NamedTuple):
    """The options of a cache: a policy, and fields that are to be otherwise than it says; None where nobody said so."""

    policy_text: Policy = None
    window: Window = None
    sinks: Sinks = None
    k_bits: KBits = None
    v_bits: VBits = None
    tile: Tile = None
    dense: Dense = None
    k_axis: KAxis = None
    v_axis: VAxis = None
    k_group: KGroup = None
    v_group: VGroup = None
    rotate: Rotate = None
    scales: Scales = None
    rollback: Rollback = None

    def policy(self, saved: "CachePolicy | None" = None) -> "CachePolicy":
        """The policy that they ask for, where they change ``saved`` unless --policy is given; UsageError for none."""
        from dataclasses import replace

        from ..engine.policy import CachePolicy
        from ..engine.policy_text import rotation

        text = "balanced" if self.policy_text is None else self.policy_text
        if saved is not None and self.policy_text is None:
            policy = saved
        else:
            policy = CachePolicy.load(text) if text.endswith(".toml") else CachePolicy.parse(text)
        own = {name: value for name, value in self._asdict().items() if value is not None}
        own.pop("policy_text", None)
        if "rotate" in own:
            own["rotate_k"], own["rotate_v"] = rotation("rotate", own.pop("rotate"))
        return replace(policy, **own)


def takes_cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """Offer the options of a cache where a command has its parameter ``cache``, which gets them as one."""
    return _offering(
        command, "cache", list(inspect.signature(CacheOptions).parameters.values()), lambda given: CacheOptions(**given)
    )


def takes_axes(command: Callable[..., None]) -> Callable[..., None]:
    """Offer the options of a cache as lists where a command has its parameter ``axes``: a dictionary of those given."""
    offered = []
    for option in list(inspect.signature(CacheOptions).parameters.values())[1:]:
        (single,) = option.annotation.__metadata__
        several = typer.Option(help=f"{single.help} A list.", show_default=False)
        offered.append(option.replace(annotation=Annotated[list[str] | None, several]))
    return _offering(command, "axes", offered, lambda given: {name: x for name, x in given.items() if x is not None})


def _offering(
    command: Callable[..., None], name: str, options: list[inspect.Parameter], gather: Callable[[dict[str, Any]], Any]
) -> Callable[..., None]:
    """A command with options in the place of one parameter, which gets what ``gather`` makes of them."""
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == name:
            parameters += [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        own = gather({option.name: given.pop(option.name) for option in options})
        command(*args, **{name: own}, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
