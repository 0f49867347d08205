"""How the server listens, whom it answers, and what it takes from them."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from offload_engine.config import brief
from offload_engine.errors import ConfigError

LEAST_KEY = 16
"""Characters of a key that guards more than the loopback interface."""


class ServerSettings(BaseModel):
    """Options of `dmoe serve`; frozen. Raises `ConfigError` that names the option for a value it can't take."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs an `api_key`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free one."""
    api_key: str | None = Field(default=None, repr=False)
    """What clients must send as `Authorization: Bearer`; None: nothing."""
    served_model_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The model's id for clients; None: made from where the model is."""
    max_waiting: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests that may wait for a place; one more is refused with 429."""
    deadline: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 600.0
    """Seconds a request may take, waiting included."""
    max_body: Annotated[int, Field(ge=1024, le=2**26)] = 2**20
    """Bytes of a request's body."""
    max_prompt: Annotated[int, Field(ge=1, le=2**26)] = 2**16
    """Bytes of a prompt in UTF-8, all turns of a conversation together: what tokenizing them takes is kept free."""
    max_connections: Annotated[int, Field(ge=1, le=65536)] = 256
    """Connections answered; more get 503, and twice as many are not taken at all."""
    patience: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 20.0
    """Seconds a client may take to send its headers, to send its body, and to take what it was sent."""
    drain: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 60.0
    """Seconds that answers under way have to end once the server was told to stop."""
    allow_origins: tuple[str, ...] = ()
    """Origins of other pages whose scripts may use the server, such as http://localhost:3000."""
    log_prompts: bool = False
    """Whether logs hold what was asked and answered."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @model_validator(mode="wrap")
    @classmethod
    def _named_errors(
        cls, values: Any, handler: ModelWrapValidatorHandler[ServerSettings], _info: ValidationInfo
    ) -> ServerSettings:
        try:
            settings = handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            option = f"--{str(first['loc'][0]).replace('_', '-')}" if first["loc"] else "server options"
            reason = first["msg"].replace("Input should be", "wanted", 1)
            raise ConfigError(f"{option} is {brief(first['input'])}; {reason[0].lower()}{reason[1:]}") from None
        settings._check_key()
        settings._check_origins()
        return settings

    def _check_key(self) -> None:
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError("the API key is empty or holds something else than visible ASCII characters")
        if self.loopback:
            return
        if key is None:
            raise ConfigError(
                f"--host is {self.host!r}, which other machines may reach, and there is no API key; "
                "pass --api-key-file, set DMOE_API_KEY, or listen on 127.0.0.1"
            )
        if len(key) < LEAST_KEY:
            raise ConfigError(
                f"the API key has {len(key)} characters; wanted at least {LEAST_KEY} where --host is {self.host!r}, "
                "which other machines may reach"
            )

    def _check_origins(self) -> None:
        for origin in self.allow_origins:
            scheme, _, place = origin.partition("://")
            if scheme not in ("http", "https") or not place or "/" in place or "*" in place:
                raise ConfigError(f"--allow-origin is {origin!r}; wanted scheme://host or scheme://host:port")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without a port, is this machine for itself alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
