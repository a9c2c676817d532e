"""HTTP routes to inspect, limit and empty the cache from ComfyUI's page.

The folder is set by REALERA_CACHE only: for security, the page cannot change it.
"""

import json
import os

from aiohttp import web
from server import PromptServer

from ..realera.storage.cache import cache_folder, cache_limit, cached_files, empty_cache

ROUTE = "/realera/cache"


def add_routes(server: PromptServer) -> None:
    """Adds the route of the cache to ComfyUI's server: GET, POST and DELETE."""

    @server.routes.get(ROUTE)
    async def show(request: web.Request) -> web.Response:
        files = cached_files()
        size = sum(path.stat().st_size for path in files)
        return web.json_response(
            {"folder": str(cache_folder()), "files": len(files), "bytes": size}
        )

    @server.routes.post(ROUTE)
    async def limit(request: web.Request) -> web.Response:
        before = os.environ.get("REALERA_CACHE_GB", "")
        try:
            os.environ["REALERA_CACHE_GB"] = str(float((await request.json())["gigabytes"]))
            cache_limit()
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            os.environ["REALERA_CACHE_GB"] = before
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({})

    @server.routes.delete(ROUTE)
    async def empty(request: web.Request) -> web.Response:
        return web.json_response({"files": len(empty_cache())})
