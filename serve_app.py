"""The Serve application: ``serve run serve_app:app``, with or without ``config=FILE``.

Reads conf/local.yaml, or the file that ``config=FILE`` or LIFELONG_CONFIG names; further
arguments are settings, such as ``serving.port=9000``. Wiring only.
"""

from __future__ import annotations

import os
from pathlib import Path

import ray
from ray import serve

from lifelong_ray.config import Config, load_config
from lifelong_ray.on_ray.serving import build_app, require_free_port
from lifelong_ray.on_ray.training import ensure_ray

_DEFAULT = Path(__file__).parent / "conf" / "local.yaml"


def app(args: dict[str, str]) -> serve.Application:
    """Build the application; ``serve run`` calls this with its ``key=value`` arguments."""
    settings = dict(args)
    path = settings.pop("config", None) or os.environ.get("LIFELONG_CONFIG")
    config = load_config(
        path or (_DEFAULT if _DEFAULT.exists() else None),
        tuple(f"{key}={value}" for key, value in settings.items()),
    )
    # Serve is asked to listen before `serve run` does, which knows port 8000 only. Where Ray
    # is there already (``serve deploy`` builds on the cluster), its own HTTP options apply.
    if not ray.is_initialized():
        _listen(config)
    return build_app(config)


def _listen(config: Config) -> None:
    ensure_ray(config)
    if serve.status().proxies:
        return  # a new build of an application that is being served
    require_free_port(config.serving.host, config.serving.port)
    serve.start(http_options={"host": config.serving.host, "port": config.serving.port})
