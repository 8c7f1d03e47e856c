"""`metatokens serve`: answer requests of OpenAI's API, with meta-tokens on a schedule."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb, at_least
from metatokens.cli.output import announce, emit, say
from metatokens.cli.schedules import add_schedule, schedule_of
from metatokens.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "answer requests of OpenAI's API (/v1/completions, /v1/chat/completions), with meta-tokens on a schedule"
    parser = add_verb(verbs, "serve", _run, text)
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder, or a model id on the hub")
    add_schedule(parser)
    parser.add_argument("--host", default="localhost", help="address to listen on")
    parser.add_argument("--port", type=at_least(1), default=8000, help="port to listen on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 and so on")


def _run(options: argparse.Namespace) -> int:
    from metatokens.training.loading import ModelFolder

    folder = ModelFolder(options.checkpoint)
    folder.check_path()
    folder.refuse_graft("a server")
    path = folder.path
    announce(options, f"opening {options.checkpoint}")
    from transformers import GenerationConfig

    from metatokens.generation.serving import check_server, serve
    from metatokens.training.checkpoint import verify_model
    from metatokens.training.untrusted import WEIGHT_SHARDS

    check_server(options.host, options.port)
    verify_model(path)
    if any(path.glob(WEIGHT_SHARDS)):
        raise UsageError(
            str(options.checkpoint),
            expected="a model in one piece",
            found="the parts of several processes",
            remedy=f"write `metatokens export {options.checkpoint} --out DIR` first",
        )
    stated = GenerationConfig.from_pretrained(path) if (path / "generation_config.json").is_file() else None
    schedule = schedule_of(options, stated)
    url = f"http://{options.host}:{options.port}/v1"
    say(f"serving the model {path} at {url} with {schedule}; Ctrl-C ends it")
    serve(path, schedule, host=options.host, port=options.port, device=options.device, seed=options.seed)
    return emit(options, {"model": str(path), "url": url}, lambda: None)
