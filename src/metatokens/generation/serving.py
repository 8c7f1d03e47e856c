"""transformers' server of OpenAI's API for models that it does not know, with meta-tokens on the server's side.

`transformers serve` looks up a model's class by its name among its own and answers 500 to any other. It also knows no
schedule, which a client cannot follow either, since it sends text. Needs the extra `metatokens[serve]`.
"""

import importlib.util
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from metatokens.errors import UsageError
from metatokens.generation.decoding import follow_schedule
from metatokens.model.compatibility import openai_server
from metatokens.model.schedule import MetaSchedule


def check_server(host: str, port: int) -> None:
    """Check what a server needs before a model is loaded.

    Raises:
        UsageError: if a package is missing, or the address cannot be listened on.
    """
    missing = [package for package in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            "serve",
            expected="the packages of a server",
            found=f"no {' and no '.join(missing)}",
            remedy="pip install 'metatokens[serve]'",
        )
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UsageError(
            f"{host}:{port}",
            expected="an address to listen on",
            found=error.strerror or str(error),
            remedy="choose another --port or --host",
        ) from None


def serve(path: Path, schedule: MetaSchedule, *, host: str, port: int, device: str, seed: int) -> None:
    """Serve the model of a folder until the process is interrupted; sampling starts from the seed.

    Raises:
        UsageError: if the schedule has meta-tokens and the model has none.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if getattr(config, "meta_token_id", None) is None and not schedule.is_empty:
        raise UsageError(
            f"schedule {schedule.kind}",
            expected="a model with a meta-token",
            found="meta_token_id None",
            remedy="use the schedule none",
        )

    class Served:
        @staticmethod
        def from_pretrained(*arguments: Any, **options: Any) -> Any:
            model = AutoModelForCausalLM.from_pretrained(
                *arguments, **{**options, "use_safetensors": True, "trust_remote_code": False}
            )
            follow_schedule(model, schedule)
            return model

    for name in config.architectures:
        # where the server looks for the class; `import transformers` may give the module that this one has replaced
        setattr(sys.modules["transformers"], name, Served)
    with suppress(KeyboardInterrupt):  # raised again by the server, once it has shut down
        openai_server()(force_model=str(path), host=host, port=port, device=device, default_seed=seed)
