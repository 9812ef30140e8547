"""A client of a Token Swarm server: `Client`, its errors and the messages it returns."""

from token_swarm_client._v1.swarm_pb2 import ExpertInfo, Finish, Mixture, ParticleInfo, ScoreResponse
from token_swarm_client.client import Client
from token_swarm_client.connection import Tls
from token_swarm_client.errors import FieldViolation, SwarmError
from token_swarm_client.requests import GenerateOptions, MixtureOptions
from token_swarm_client.streams import AsyncTextStream, TextStream

__all__ = [
    "AsyncTextStream",
    "Client",
    "ExpertInfo",
    "FieldViolation",
    "Finish",
    "GenerateOptions",
    "Mixture",
    "MixtureOptions",
    "ParticleInfo",
    "ScoreResponse",
    "SwarmError",
    "TextStream",
    "Tls",
]
