"""The page at `/`: a few files of this package, and the headers under which a browser runs nothing else."""

from __future__ import annotations

from importlib import resources

from starlette.responses import Response

from offload_engine.server.failures import refusal_of_status

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Pages:
    """The page's files, read once."""

    def __init__(self) -> None:
        folder = resources.files("offload_engine.server") / "page"
        self._files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name.split(".")[-1] in KINDS}

    async def index(self) -> Response:
        """The page itself."""
        return await self.file("index.html")

    async def file(self, name: str) -> Response:
        """One of its files."""
        if name not in self._files:
            return refusal_of_status(404).response()
        kind = KINDS[name.split(".")[-1]]
        return Response(self._files[name], headers=HEADERS, media_type=kind)
