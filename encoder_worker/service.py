"""EncoderService on grpc.aio: unpack, call, pack. Errors leave with google.rpc details.

Does not know models or batching.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from cache import DEFAULT_CODEC
from cache.collection import Collection
from cache.errors import CollectionNotFound, StoreDamaged
from cache.record import is_passage_id
from cache.store import Store, public_url
from encoder_worker import messages, on_demand
from encoder_worker.errors import Context, Starting, translated
from encoder_worker.scheduler import Worker
from encoder_worker.upsert import Upload
from preread.v1 import common_pb2, encoder_pb2, encoder_pb2_grpc

log = logging.getLogger(__name__)


class EncoderService(encoder_pb2_grpc.EncoderServiceServicer):
    """The edge. `engine` is None until the model has loaded; every call is UNAVAILABLE until then."""

    def __init__(self, on_upserted: Callable[[encoder_pb2.UpsertResponse], None] = lambda _: None) -> None:
        """
        Args:
            on_upserted: hears of what an upload acknowledges.
        """
        self.engine: Worker | None = None
        self._on_upserted = on_upserted

    async def Upsert(  # type: ignore[override]  # noqa: N802  # the stubs know sync iterators only
        self, request_iterator: AsyncIterator[encoder_pb2.UpsertRequest], context: Context
    ) -> None:
        async with translated(context), aclosing(Upload(self._loaded()).run(request_iterator)) as responses:
            async for response in responses:
                self._on_upserted(response)
                await context.write(response)

    async def Encode(  # noqa: N802
        self, request: encoder_pb2.EncodeRequest, context: Context
    ) -> encoder_pb2.EncodeResponse:
        async with translated(context):
            return await on_demand.encode(self._loaded(), request)

    async def Delete(  # noqa: N802
        self, request: encoder_pb2.DeleteRequest, context: Context
    ) -> encoder_pb2.DeleteResponse:
        async with translated(context, request.collection):
            engine = self._loaded()
            return encoder_pb2.DeleteResponse(num_deleted=await engine.call_store(_delete, engine.store, request))

    async def GetStats(  # noqa: N802
        self, request: encoder_pb2.GetStatsRequest, context: Context
    ) -> encoder_pb2.GetStatsResponse:
        async with translated(context, request.collection):
            engine = self._loaded()
            return encoder_pb2.GetStatsResponse(
                collections=await engine.call_store(_collections, engine.store, request.collection)
            )

    async def Describe(  # noqa: N802
        self, request: encoder_pb2.DescribeRequest, context: Context
    ) -> encoder_pb2.DescribeResponse:
        async with translated(context):
            engine = self._loaded()
            return encoder_pb2.DescribeResponse(
                encoder=messages.pack_identity(engine.encoder.identity),
                default_compression_ratio=engine.encoder.settings.default_compression_ratio,
                default_codec=DEFAULT_CODEC,
                dtype=engine.encoder.dtype_name,
                device=engine.encoder.device_name,
                store=public_url(engine.config.store),
                max_message_bytes=engine.config.max_message_bytes,
            )

    def _loaded(self) -> Worker:
        if self.engine is None:
            raise Starting("this worker is loading its model, or stopping")
        return self.engine


def _delete(store: Store, request: encoder_pb2.DeleteRequest) -> int:
    collection = Collection.open(store, request.collection)
    # An id that cannot exist is not there; so often as an id is named, it can go once.
    return collection.delete_many([i for i in dict.fromkeys(request.passage_ids) if is_passage_id(i)])


def _collections(store: Store, name: str) -> list[common_pb2.CollectionInfo]:
    names = [Collection.open(store, name).name] if name else store.list_collections()
    aliases: dict[str, list[str]] = {}
    for alias, target in sorted(store.aliases().items()):
        aliases.setdefault(target, []).append(alias)
    infos = []
    for one in names:
        try:
            manifest = store.read_manifest(one)
            if manifest is not None:  # dropped a moment ago
                infos.append(messages.pack_collection(manifest, store.stats(one), aliases.get(one, [])))
        except StoreDamaged as exc:
            if name:
                raise
            log.warning("collection %r cannot be read: %s", one, exc)  # costs itself only
    if name and not infos:
        raise CollectionNotFound(f"collection: {name!r} was dropped")
    return infos
