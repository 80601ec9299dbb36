"""Versions of deployments by what each one is, so that Serve replaces the replicas of what has changed alone.

Serve gives all deployments of an application one version, a hash of the application's arguments: a change of one base
would replace the replicas of all of them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import PrivateAttr
from ray.serve import Deployment

from loray import __version__
from serve_apps.serve_internals import DeploymentConfig


class VersionedConfig(DeploymentConfig):  # type: ignore[misc]
    """Has its own version in the form that Serve's controller is sent, whatever version Serve sets before."""

    _own: str = PrivateAttr(default="")

    def to_proto(self) -> Any:
        proto = super().to_proto()
        proto.version = self._own
        return proto


def versioned(deployment: Deployment, *arguments: Any) -> Deployment:
    """The deployment with a version that follows from `arguments`, JSON of what its replicas are given, and from
    loray's version. Serve itself replaces replicas whose actors' options change, such as the environment.
    """
    config = VersionedConfig(**dict(deployment._deployment_config))
    said = json.dumps([__version__, deployment.name, *arguments], sort_keys=True)
    config._own = hashlib.sha256(said.encode()).hexdigest()
    return Deployment(deployment.name, config, deployment._replica_config, version=None, _internal=True)
