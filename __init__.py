"""RealEra for ComfyUI: ComfyUI's way in. The core lives in `realera/`, the nodes in `nodes/`."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI, which alone has the API that the nodes are written for."""
    from server import PromptServer

    from .nodes import RealEraExtension
    from .nodes.cache_routes import add_routes

    add_routes(PromptServer.instance)
    return RealEraExtension()
