"""Collection: passages of one encoder identity in a store, encoded on writing, decoded on reading or by the reader."""

import base64
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import xxhash

from cache import errors
from cache.manifest import Manifest
from cache.record import RECORD_VERSION, Damaged, Record, is_passage_id, passage_id_bytes
from cache.states import AnyStates, Codes, EncodedPassage, PassageStates, decode_all
from cache.store import Store, StoreStats

_T = TypeVar("_T")

_SCAN_BATCH_PASSAGES = 256
_IDS_OF_TEXT = 1000  # of a text that is deleted, in one read
_ENCODED_STATES = 1024  # about so many in one call of the codec
_TOKEN_CHECKSUM = struct.Struct("<Q")

# Numbers outside a codec's trained range, as a share of a write's. On scifact with preread-mini a table of 100
# abstracts or more clips 0.03% (SQ8 and SQ4, r = 1) to 0.2% (r = 32) of other abstracts' numbers, PQ up to 1.7%; one of
# 12 uniform passages 6% to 12% (r = 1), 41% to 56% (r = 4) and 81% (r = 32), which moves margins by 0.8 to 3 of their
# deviation. At 5% they move by some 0.15 of it.
MAX_CLIPPED_SHARE = 0.05
# Fewer states are judged together with the next: one odd word of one state is 50% outside a good table, and harmless.
_MIN_JUDGED_STATES = 32


@dataclass(frozen=True, eq=False, slots=True)
class StoredPassage:
    """One passage to be written."""

    passage_id: str
    states: AnyStates  # EncodedPassage by `Collection.encode` alone
    text: str | None = None
    num_clipped_before: int = 0  # numbers that another codec had clipped before these states were read back
    num_clipped: int = 0  # of encoded states: numbers outside the range the codec was trained for


class Collection:
    """One collection, whatever it is called later; open it again to follow a moved alias."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self.name = manifest.collection
        self.storage_name = manifest.storage_name
        self.codec = manifest.make_codec()
        self._binding = manifest.binding
        self._unjudged = (0, 0)  # states and clipped numbers of writes too small to be judged alone

    @classmethod
    def create(cls, store: Store, manifest: Manifest, *, exist_ok: bool = False) -> "Collection":
        """Create the collection `manifest.collection`; with `exist_ok` open an existing one, its codec table kept.

        Encoder, ratio, codec and text keeping must agree; else EncoderMismatch or CollectionExists names both sides.
        """
        try:
            manifest = store.write_manifest(manifest)
        except errors.CollectionExists:
            existing = store.read_manifest(manifest.collection)
            if existing is None or not exist_ok:
                raise
            _check_encoder(existing, manifest.fingerprint, manifest.checkpoint)
            for name in ("dim", "compression_ratio", "codec", "stores_text"):
                theirs, ours = getattr(existing, name), getattr(manifest, name)
                if theirs != ours:
                    told = f"collection: {existing.collection!r} exists with {name} {theirs!r}, expected {ours!r}"
                    raise errors.CollectionExists(told) from None
            manifest = existing
        return cls(store, manifest)

    @classmethod
    def open(
        cls, store: Store, name_or_alias: str, *, fingerprint: str | None = None, checkpoint: str = ""
    ) -> "Collection":
        """Open by name or alias, for an encoder of that fingerprint and name (else EncoderMismatch) or to read only."""
        name, before = store.resolve(name_or_alias), None
        while (manifest := store.read_manifest(name)) is None and name != before:
            name, before = store.resolve(name_or_alias), name  # it may have been renamed since the alias was read
        if manifest is None:
            known = _names(store)
            raise errors.CollectionNotFound(f"collection: {name_or_alias!r} does not exist, the store has: {known}")
        if fingerprint is not None:
            _check_encoder(manifest, fingerprint, checkpoint)
        return cls(store, manifest)

    def put_many(self, passages: Sequence[StoredPassage], *, allow_clipped: bool = False) -> list[int]:
        """Encode and write, durable on return; returns numbers of each outside the range the codec was trained for.

        Raises InvalidPassage, or OutOfRange where over MAX_CLIPPED_SHARE of the numbers of the write (small writes are
        taken together) were clipped, unless `allow_clipped`; nothing was written then.
        """
        seen: set[str] = set()
        for passage in (passages := self.encode(passages)):
            if passage.passage_id in seen:
                raise errors.InvalidPassage(passage.passage_id, "given twice in one write")
            seen.add(passage.passage_id)
        if not passages:
            return []
        num_states, clipped = sum(one.states.num_states for one in passages), [one.num_clipped for one in passages]
        judged = (self._unjudged[0] + num_states, self._unjudged[1] + sum(clipped))
        is_odd = judged[0] >= _MIN_JUDGED_STATES and judged[1] > MAX_CLIPPED_SHARE * judged[0] * self.manifest.dim
        if is_odd and not allow_clipped:
            self._check_clipped(passages)
        records = {passage.passage_id: self._record(passage) for passage in passages}
        try:
            self.store.put_many(self.storage_name, records)
        except errors.CollectionNotFound as exc:
            gone = "is gone: it was dropped, or its store removed, after it was opened"
            raise errors.CollectionGone(f"collection: {self.name!r} {gone}") from exc
        self._unjudged = judged if judged[0] < _MIN_JUDGED_STATES else (0, 0)
        return clipped

    def encode(self, passages: Sequence[StoredPassage]) -> list[StoredPassage]:
        """With states as the codec writes them, for `put_many`: a writer that gathers passages holds less memory.

        Raises InvalidPassage; encoded passages stay as they are.
        """
        encoded, plain, num_states = list(passages), list[int](), 0
        for i, passage in enumerate(passages):
            self._check(passage)
            if isinstance(passage.states, PassageStates):
                plain.append(i)
                num_states += passage.states.num_states
            if num_states >= _ENCODED_STATES or i + 1 == len(passages):  # in parts, so that copies of states stay small
                for at, one in zip(plain, self._encode([passages[at] for at in plain]), strict=True):
                    encoded[at] = one
                plain, num_states = [], 0
        return encoded

    def get_many(self, passage_ids: Sequence[str]) -> list[PassageStates | Damaged | None]:
        """One entry per id, in order; None where there is or can be none. Their states are views into one array."""
        return decode_all(self.get_encoded_many(passage_ids))

    def get_encoded_many(self, passage_ids: Sequence[str]) -> list[EncodedPassage | Damaged | None]:
        """The same without decoding: codes as the store gave them, checked."""
        return list(map(self._fitting, passage_ids, self._read(self.store.get_many, passage_ids)))

    def get_records(self, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        """Whole records, texts included; Damaged also where their states cannot be used, as `verify` says."""
        records = self._read(self.store.get_many, passage_ids)
        states = decode_all(list(map(self._fitting, passage_ids, records)))
        return [
            Damaged(passage_id, damage) if (damage := _damage(found)) else record
            for passage_id, record, found in zip(passage_ids, records, states, strict=True)
        ]

    def get_texts(self, passage_ids: Sequence[str]) -> list[str | None]:
        """The stored text per id; None where there is none, or the passage is damaged or missing."""
        records = self._read(self.store.get_many, passage_ids)
        return [record.text if isinstance(record, Record) else None for record in records]

    def find_texts(self, digests: Sequence[bytes]) -> list[tuple[str, EncodedPassage] | None]:
        """Per SHA-256 of a text, the first passage that was encoded from it and its states; None where none is whole.

        Both reads of the store share the time budget of one.
        """
        with self.store.one_read():
            ids = self.store.ids_of_texts(self.storage_name, digests)
            found = self._of_texts(digests, [own[:1] for own in ids])
            # A second id is needed where the first was changed or damaged, which is rare.
            missed = [i for i, own in enumerate(ids) if found[i] is None and own[1:]]
            others = self._of_texts([digests[i] for i in missed], [ids[i][1:] for i in missed])
        for i, other in zip(missed, others, strict=True):
            found[i] = other
        return found

    def _of_texts(
        self, digests: Sequence[bytes], ids: Sequence[Sequence[str]]
    ) -> list[tuple[str, EncodedPassage] | None]:
        distinct = list(dict.fromkeys(chain.from_iterable(ids)))
        read = dict(zip(distinct, self.get_encoded_many(distinct), strict=True)) if distinct else {}
        whole = {one: states for one, states in read.items() if isinstance(states, EncodedPassage)}
        return [
            next(((one, whole[one]) for one in own if one in whole and whole[one].text_digest == digest), None)
            for digest, own in zip(digests, ids, strict=True)
        ]

    def digests(self, passage_ids: Sequence[str]) -> list[bytes | None]:
        """SHA-256 of the text each stored passage was encoded from, or None; for writers, reads no states."""
        headers = self._read(partial(self.store.headers_many, bulk=True), passage_ids)
        return [one.text_digest if one is not None and one.binding == self._binding else None for one in headers]

    def delete_many(self, passage_ids: Sequence[str]) -> int:
        return self.store.delete_many(self.storage_name, [id_ for id_ in passage_ids if is_passage_id(id_)])

    def delete_texts(self, digests: Sequence[bytes]) -> tuple[int, list[bytes]]:
        """Remove every passage of texts, by their SHA-256; returns how many, and digests under which none was.

        Finds them where the store `finds_texts` of this collection. A damaged passage goes with its text.
        """
        num_deleted, missing, limit = 0, dict.fromkeys(digests), _IDS_OF_TEXT
        seen: set[tuple[bytes, str]] = set()
        todo = list(missing)
        while todo:
            found = self.store.ids_of_texts(self.storage_name, todo, limit)
            new = {(digest, one) for digest, ids in zip(todo, found, strict=True) for one in ids} - seen
            ids = list({one for _, one in new})
            headers = dict(zip(ids, self.store.headers_many(self.storage_name, ids, bulk=True), strict=True))
            doubted = [one for one, header in headers.items() if header is None]  # damaged, or gone
            read = self.store.get_many(self.storage_name, doubted)
            damaged = {one.passage_id for one in read if isinstance(one, Damaged)}
            gone = set[str]()
            for digest, one in new:
                header = headers[one]
                if one in damaged or (header is not None and header.text_digest == digest):
                    gone.add(one)
                    missing.pop(digest, None)
            num_deleted += self.store.delete_many(self.storage_name, list(gone))
            seen |= new
            # There may be more of a text than were listed; ids that lead nowhere are listed again, and hide others.
            todo = [digest for digest, ids in zip(todo, found, strict=True) if len(ids) == limit]
            limit = limit if gone else 10 * limit
        return num_deleted, list(missing)

    def stats(self) -> StoreStats:
        return self.store.stats(self.storage_name)

    def scan(self) -> Iterator[tuple[str, PassageStates | Damaged]]:
        return ((passage_id, states) for passage_id, _, states in self._scan())

    def scan_texts(self) -> Iterator[tuple[str, str | None]]:
        """Every whole passage's id and stored text, in no particular order; decodes no states."""
        for passage_id, record in self.store.scan(self.storage_name):
            if isinstance(record, Record) and record.header.binding == self._binding:
                yield passage_id, record.text

    def verify(self) -> Iterator[tuple[str, int, str]]:
        """Read and decode every passage: its id, the version of its record (0 where damaged), its damage or ""."""
        for passage_id, record, states in self._scan():
            yield passage_id, record.header.version if isinstance(record, Record) else 0, _damage(states)

    def list_ids(self, limit: int, page_token: str = "") -> tuple[list[str], str]:
        """A page of ids and the token of the next one, "" with the last, as Store.list_ids does; InvalidPageToken.

        A token is of this collection, and of no other one that took its name or alias.
        """
        after = b""
        if page_token:
            with suppress(ValueError):  # no base64; a checksum finds the rest
                after = base64.urlsafe_b64decode(page_token)
            after = after[_TOKEN_CHECKSUM.size :]
            if not after or page_token != self._page_token(after):
                raise errors.InvalidPageToken(f"no token of collection {self.name!r}")
        ids, after = self.store.list_ids(self.storage_name, limit, after)
        return ids, self._page_token(after) if after else ""

    def _page_token(self, after: bytes) -> str:
        checksum = xxhash.xxh3_64_intdigest(f"{self.storage_name}:{self._binding}:".encode() + after)
        return base64.urlsafe_b64encode(_TOKEN_CHECKSUM.pack(checksum) + after).decode()

    def _scan(self) -> Iterator[tuple[str, Record | Damaged, PassageStates | Damaged]]:
        records = self.store.scan(self.storage_name)
        while batch := list(islice(records, _SCAN_BATCH_PASSAGES)):
            found = [self._fitting(passage_id, record) for passage_id, record in batch]
            for (passage_id, record), states in zip(batch, decode_all(found), strict=True):
                if states is not None:
                    yield passage_id, record, states

    def _read(self, read: Callable[[str, list[str]], list[_T]], passage_ids: Sequence[str]) -> list[_T | None]:
        # An id that cannot exist costs itself only: it is missing.
        possible = [passage_id for passage_id in passage_ids if is_passage_id(passage_id)]
        found = dict(zip(possible, read(self.storage_name, possible), strict=True))
        return [found.get(passage_id) for passage_id in passage_ids]

    def _fitting(self, passage_id: str, record: Record | Damaged | None) -> EncodedPassage | Damaged | None:
        """A whole record may still not belong to this collection: the store may be shared."""
        if not isinstance(record, Record):
            return record
        header = record.header
        if header.binding != self._binding:
            return Damaged(passage_id, "written under another manifest of this name; open the collection again")
        if header.code_size != self.codec.code_size_bytes:
            return Damaged(passage_id, f"{header.code_size} bytes per state, expected {self.codec.code_size_bytes}")
        if header.compression_ratio != self.manifest.compression_ratio:
            return Damaged(passage_id, f"ratio {header.compression_ratio}, expected {self.manifest.compression_ratio}")
        # The same for equal texts under two ids, so that they share entries of the caches.
        key = header.text_digest + struct.pack("<QQ", header.payload_checksum, header.binding)
        states, ratio = Codes(self.codec, record.codes), header.compression_ratio
        return EncodedPassage(states, record.window_tokens, ratio, header.truncated, header.text_digest, key)

    def _check(self, passage: StoredPassage) -> None:
        states, passage_id = passage.states, passage.passage_id
        try:
            passage_id_bytes(passage_id)
            if passage.text is not None:
                passage.text.encode()
        except (errors.InvalidName, UnicodeEncodeError) as exc:
            raise errors.InvalidPassage(passage_id, str(exc)) from exc
        if (given := states.compression_ratio) != (ratio := self.manifest.compression_ratio):
            raise errors.InvalidPassage(passage_id, f"compression_ratio {given}, the collection has {ratio}")
        if isinstance(states, EncodedPassage):
            if states.states.codec is not self.codec:
                raise errors.InvalidPassage(passage_id, "encoded by another collection's codec")
            return
        if states.dim != self.manifest.dim:
            raise errors.InvalidPassage(passage_id, f"dim {states.dim}, the collection has {self.manifest.dim}")
        if not np.isfinite(states.states).all():
            raise errors.InvalidPassage(passage_id, "states hold NaN or infinity")

    def _check_clipped(self, passages: Sequence[StoredPassage]) -> None:
        """A few odd passages among many are stored, and counted. Where there are many, the table is odd."""
        reasons = {
            passage.passage_id: f"{share:.0%} of its numbers lie outside what {self.codec.factory} was trained for; "
            f"expected at most {MAX_CLIPPED_SHARE:.0%}"
            for passage in passages
            if (share := passage.num_clipped / (passage.states.num_states * self.manifest.dim)) > MAX_CLIPPED_SHARE
        }
        if reasons:  # else they were in the small writes before
            raise errors.OutOfRange(reasons)

    def _encode(self, passages: Sequence[StoredPassage]) -> list[StoredPassage]:
        if not passages:
            return []
        plain: list[PassageStates] = [one.states for one in passages if isinstance(one.states, PassageStates)]
        states = np.concatenate([one.states for one in plain])
        try:
            codes = self.codec.encode(states)
        except errors.CodecError:
            for passage, one in zip(passages, plain, strict=True):  # find the one that cannot be encoded
                try:
                    self.codec.encode(one.states)
                except errors.CodecError as exc:
                    raise errors.InvalidPassage(passage.passage_id, str(exc)) from exc
            raise
        ends = np.cumsum([one.num_states for one in plain])[:-1]
        parts = np.split(codes, ends), np.split(self.codec.count_outside(states, codes), ends)
        return [
            replace(passage, states=one.encoded(Codes(self.codec, rows)), num_clipped=int(outside.sum()))
            for passage, one, rows, outside in zip(passages, plain, *parts, strict=True)
        ]

    def _record(self, passage: StoredPassage) -> Record:
        states = passage.states
        assert isinstance(states, EncodedPassage)
        return Record.build(
            states.states.rows,
            window_tokens=states.window_tokens,
            compression_ratio=states.compression_ratio,
            truncated=states.truncated,
            text_digest=states.text_digest,
            binding=self._binding,
            text=passage.text if self.manifest.stores_text else None,
            num_clipped=passage.num_clipped + passage.num_clipped_before,
            version=1 if self.manifest.version == 1 else RECORD_VERSION,
        )


def _names(store: Store) -> str:
    """What can be opened, for a message: every collection, and its aliases."""
    aliases: dict[str, str] = {}
    for alias, name in sorted(store.aliases().items()):
        aliases[name] = f"{aliases[name]}, {alias}" if name in aliases else f"alias {alias}"
    names = store.list_collections()
    return ", ".join(f"{name} ({aliases[name]})" if name in aliases else name for name in names) or "none"


def _damage(states: PassageStates | Damaged | None) -> str:
    """Why decoded states cannot be used; "" where they can, or there are none."""
    if isinstance(states, Damaged):
        return states.reason
    return "decoded states are not finite" if states is not None and not np.isfinite(states.states).all() else ""


def _check_encoder(manifest: Manifest, fingerprint: str, checkpoint: str) -> None:
    if manifest.fingerprint != fingerprint:
        theirs = f"encoder {manifest.checkpoint!r} (fingerprint {manifest.fingerprint})"
        ours = f"{checkpoint!r} (fingerprint {fingerprint}); index it again or use the checkpoint it was written with"
        raise errors.EncoderMismatch(f"collection {manifest.collection!r} was written by {theirs}, not by {ours}")
