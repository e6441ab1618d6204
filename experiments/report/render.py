"""Drawing by vl-convert: figures into files, and the JavaScript that draws them in a page. Nothing is fetched."""

import functools
import json
from pathlib import Path
from types import ModuleType

from ...models.errors import UsageError
from .figures import Figure, theme

PNG_SCALE = 2
_SNIPPET = "window.vegaEmbed = vegaEmbed;"


def library() -> ModuleType:
    """The module vl_convert; UsageError where it is not installed."""
    try:
        import vl_convert
    except ImportError:
        raise UsageError("`mixkv report` draws with vl-convert-python: pip install 'mixkv[report]'") from None
    return vl_convert


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and vega-embed as one script that leaves ``vegaEmbed`` in the window; safe between script tags."""
    return str(library().javascript_bundle(_SNIPPET)).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def write_files(figures: list[Figure], folder: Path) -> list[Path]:
    """Each figure as SVG and PNG (twice as many pixels), in the light theme on white; the files written.

    Raises:
        UsageError: a folder or file that cannot be written.

    """
    written = []
    try:
        folder.mkdir(exist_ok=True)
        for figure in figures:
            spec = json.dumps({**figure.static(), "config": theme(False)})
            svg = library().vegalite_to_svg(spec, allowed_base_urls=[])
            for suffix, content in (("svg", svg.encode()), ("png", library().svg_to_png(svg, scale=PNG_SCALE))):
                file = folder / f"{figure.id}.{suffix}"
                file.write_bytes(content)
                written.append(file)
    except OSError as error:
        raise UsageError(f"--figures {folder}: cannot be written: {error.strerror}") from None
    return written
