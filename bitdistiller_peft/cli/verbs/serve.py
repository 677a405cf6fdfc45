"""`bitdistiller serve`: transformers' own server, which speaks the OpenAI protocol, with this library plugged in."""

from __future__ import annotations

from typing import Any

from bitdistiller_peft.cli import models
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.precision import load_dtype
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import ConfigError


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Serve until Ctrl-C.

    Raises:
        ConfigError: the server's packages are not installed.
    """
    from transformers.utils.import_utils import is_serve_available

    import bitdistiller_peft.hub  # noqa: F401  (fills the sockets)

    source, options = models.model_folder(settings.arguments["model"]), settings.arguments
    if not is_serve_available():
        raise ConfigError("`serve` needs transformers' server: pip install 'transformers[serving]'.")
    result = {"model": source, "url": f"http://{options['host']}:{options['port']}/v1"}
    if settings.is_dry_run:
        return {**result, "dry_run": True}
    from transformers.cli.serve import Serve

    console.say(f"serving {source} at {result['url']}; Ctrl-C stops")
    device = models.choose_device(settings, console)
    Serve(
        force_model=source,
        device=device,
        dtype=load_dtype(source, settings, device),
        host=options["host"],
        port=options["port"],
        default_seed=settings["seed"],
    )
    return result


VERB = Verb(
    "serve",
    "speak the OpenAI protocol (transformers' own server)",
    run,
    sections=("",),
    positionals=(Positional("model", "folder or Hub name"),),
    own=(
        Option("host", "text", "address to listen at", "localhost"),
        Option("port", "int", "port to listen at", 8000),
    ),
    hidden=("model", "output", "revision"),
    epilog="example: bitdistiller serve out/distill/packed; then: transformers chat MODEL http://localhost:8000",
)
