"""vLLM's routes that load and unload adapters, for deployment tools that call them.

A model is served as soon as the catalog has it, and replicas load and evict adapters by themselves. So these routes say
whether the name can be requested, and change nothing.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from loray.api.openai.body import Body
from loray.api.openai.vllm.adapters import LoadLoraRequest, UnloadLoraRequest
from loray.errors import RequestError, shown
from loray.serving.access import check
from serve_apps.access import may, principal_of
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.routes.bodies import body_of

BODIES: dict[str, type[Body]] = {"/v1/load_lora_adapter": LoadLoraRequest, "/v1/unload_lora_adapter": UnloadLoraRequest}


def create_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    async def check_own(request: Request, name: str) -> None:
        principal = principal_of(request)
        adapter = (await gateway.model(name, principal)).adapter
        if adapter is None:
            raise RequestError(f"{name!r} is a base model, not an adapter", "lora_name")
        check(principal, "publish", gateway.directory.entry(adapter).tenant)

    @router.post("/v1/load_lora_adapter")
    @may("publish")
    async def load_lora_adapter(request: Request) -> Response:
        """vLLM's, for deployment tools: 200 where the catalog has the adapter; a path is refused."""
        body = await body_of(request, LoadLoraRequest)
        if body.lora_path not in (None, "", body.lora_name):
            raise RequestError(
                f"lora_path {shown(body.lora_path)}: adapters come from the catalog alone; publish the folder with "
                f"`loray adapters import FOLDER --name {body.lora_name[:96]}`, then request it by that name",
                "lora_path",
            )
        await check_own(request, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' can be requested.")

    @router.post("/v1/unload_lora_adapter")
    @may("publish")
    async def unload_lora_adapter(request: Request) -> Response:
        """vLLM's, for deployment tools: 200 where the catalog has the adapter, which stays."""
        body = await body_of(request, UnloadLoraRequest)
        await check_own(request, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' is evicted when its memory is needed.")

    return router
