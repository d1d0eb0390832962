"""JSON schemas of every body, for the OpenAPI document. Data only."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _says(schema: Schema, description: str) -> Schema:
    return schema | {"description": description}


STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SCORE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
TEXT_OR_OBJECT: Schema = {"anyOf": [STRING, _object(("text",), text=STRING)]}

OURS: dict[str, Schema] = {
    "model": _or_null(_says(STRING, "A served name, or absent for the first")),
    "instruction": _or_null(_says(STRING, "What to look for; absent or null: the model's default; empty: nothing")),
    "collection": _or_null(_says(STRING, "Collection or alias that ids refer to")),
    "passage_ids": _or_null(_says(_list(STRING), "Ids beside the texts, or alone in place of them")),
    "compression_ratio": _or_null(
        _says(COUNT, "A multiple of the stored ratio; 0 or absent: the server's default, else the stored one")
    ),
    "stages": _or_null(
        _says(
            {"anyOf": [STRING, _list(_object(("compression_ratio",), compression_ratio=COUNT, keep=COUNT))]},
            "A cascade in place of one ratio: '32:100, 4:20, 1' reads all at 32, the best 100 at 4, 20 of those at 1",
        )
    ),
    "on_miss": _or_null({"enum": ["encode", "skip", "fail"], "description": "For ids that are not stored"}),
    "return_margins": _or_null(
        _says(FLAG, "Adds margin (yes-logit minus no-logit), compression_ratio and stages to each result")
    ),
    "max_tokens_per_doc": _or_null(_says(COUNT, "Texts are cut there")),
}
RESULT: dict[str, Schema] = {
    "index": _says(COUNT, "Position in the request"),
    "id": _says(STRING, "Where the request gave one"),
    "margin": _says(NUMBER, "With return_margins"),
    "compression_ratio": _says(COUNT, "With return_margins: what it was read at"),
    "truncated": _says(FLAG, "With return_margins, where it was cut: true"),
    "stages": _says(
        _list(
            _object(
                ("compression_ratio", "margin", "score", "num_states"),
                compression_ratio=COUNT,
                margin=NUMBER,
                score=SCORE,
                num_states=COUNT,
            )
        ),
        "With return_margins, of a cascade: every stage that scored it",
    ),
}
DOCUMENT = {"anyOf": [STRING, _object(text=_or_null(STRING), id=_or_null(STRING))]}
TOP = _or_null(_says(COUNT, "0, absent or more than there are: all"))
USAGE = _object(("total_tokens",), prompt_tokens=COUNT, total_tokens=COUNT)

SCHEMAS: dict[str, Schema] = {
    "Object": {"type": "object"},
    "State": _object(("status",), status=STRING, degraded=STRING),
    "Error": _object(
        ("error", "message", "detail"),
        error=_object(
            ("message", "type", "param", "code"), message=STRING, type=STRING, param=_or_null(STRING), code=STRING
        ),
        message=STRING,
        detail=STRING,
    ),
    "TeiError": _object(
        ("error", "error_type"),
        error=STRING,
        error_type={"enum": ["unhealthy", "backend", "overloaded", "validation"]},
    ),
    "RerankRequest": _object(
        ("query",),
        query=TEXT_OR_OBJECT,
        documents=_says(_list(DOCUMENT), "May be absent beside passage_ids"),
        top_n=TOP,
        return_documents=_or_null(FLAG),
        **OURS,
    ),
    "RerankAnswer": _object(
        ("id", "object", "created", "model", "results", "usage", "meta"),
        id=STRING,
        object={"const": "rerank"},
        created=INTEGER,
        model=STRING,
        results=_list(
            _object(
                ("index", "relevance_score"),
                relevance_score=_says(NUMBER, "In [0, 1]; a margin with infinity's raw_scores"),
                document=_says(
                    {"anyOf": [STRING, _object(("text",), text=STRING)]}, "With return_documents; a string for infinity"
                ),
                **RESULT,
            )
        ),
        usage=USAGE,
        meta=_object(
            ("api_version", "billed_units", "tokens"),
            api_version={"type": "object"},
            billed_units={"type": "object"},
            tokens={"type": "object"},
            warnings=_says(_list(STRING), "Candidates that were not scored, and why"),
        ),
    ),
    "TeiRequest": _object(
        ("query", "texts"),
        query=TEXT_OR_OBJECT,
        texts=_list(DOCUMENT),
        top_n=TOP,
        return_text=_or_null(FLAG),
        raw_scores=_or_null(_says(FLAG, "Margins in place of scores")),
        truncate=_or_null(_says(FLAG, "false: refuse what is too long")),
        truncation_direction=_or_null({"enum": ["Right", "Left", "right", "left"]}),
        **OURS,
    ),
    "TeiAnswer": _list(_object(("index", "score"), score=NUMBER, text=STRING, **RESULT)),
    "NimRequest": _object(
        ("query", "passages"),
        query=TEXT_OR_OBJECT,
        passages=_list(DOCUMENT),
        top_n=TOP,
        truncate=_or_null({"enum": ["NONE", "END", "none", "end"]}),
        **OURS,
    ),
    "NimAnswer": _object(("rankings",), rankings=_list(_object(("index", "logit"), logit=NUMBER, **RESULT))),
    "VoyageRequest": _object(
        ("query", "documents"),
        query=TEXT_OR_OBJECT,
        documents=_list(DOCUMENT),
        top_k=TOP,
        truncation=_or_null(_says(FLAG, "false: refuse what is too long")),
        return_documents=_or_null(FLAG),
        **OURS,
    ),
    "VoyageAnswer": _object(
        ("object", "data", "model", "usage"),
        object={"const": "list"},
        data=_list(_object(("index", "relevance_score"), relevance_score=SCORE, document=STRING, **RESULT)),
        model=STRING,
        usage=USAGE,
    ),
    "MixedbreadRequest": _object(
        ("query", "input"),
        query=TEXT_OR_OBJECT,
        input=_list(DOCUMENT),
        top_k=TOP,
        return_input=_or_null(FLAG),
        **OURS,
    ),
    "MixedbreadAnswer": _object(
        ("data",),
        object={"const": "list"},
        data=_list(_object(("index", "score"), score=SCORE, input=STRING, **RESULT)),
        model=STRING,
        usage=USAGE,
    ),
    "ScoreRequest": {
        "anyOf": [
            _object(
                ("text_1", "text_2"),
                text_1={"anyOf": [STRING, _list(STRING)]},
                text_2={"anyOf": [STRING, _list(STRING)]},
            ),
            _object(("pairs",), pairs=_list({"type": "array", "items": STRING, "minItems": 2, "maxItems": 2})),
        ]
    },
    "ScoreAnswer": _object(
        ("object", "data", "model", "usage"),
        id=STRING,
        object={"const": "list"},
        data=_list(_object(("index", "object", "score"), object={"const": "score"}, score=SCORE, **RESULT)),
        model=STRING,
        usage=USAGE,
    ),
    "Models": _object(("object", "data"), object={"const": "list"}, data=_list(_object(("id", "object"), id=STRING))),
    "Info": _object(("model_id", "model_type", "version"), model_id=STRING, version=STRING, max_candidates=COUNT),
    "Passage": _object(("id", "text"), id=STRING, text=STRING),
    "UploadRequest": {
        "anyOf": [
            _object(
                ("passages",),
                passages=_list(_ref("Passage")),
                compression_ratio=_or_null(COUNT),
                codec=_or_null(STRING),
                store_text=_or_null(FLAG),
            ),
            _list(_ref("Passage")),
        ]
    },
    "Upload": _object(
        ("object", "collection", "num_stored", "num_unchanged", "num_refused", "num_truncated", "refused"),
        object=STRING,
        collection=STRING,
        num_stored=COUNT,
        num_unchanged=COUNT,
        num_refused=COUNT,
        num_truncated=COUNT,
        num_clipped=COUNT,
        refused=_list(_object(("message",), id=_says(STRING, "Absent: a line too long to read"), message=STRING)),
    ),
    "DeleteRequest": _object(("ids",), ids=_list(STRING)),
    "Deleted": _object(("num_deleted",), object=STRING, collection=STRING, num_deleted=COUNT),
    "Collection": _object(
        ("object", "id", "aliases", "compression_ratio", "codec", "num_passages"),
        object={"const": "collection"},
        id=STRING,
        aliases=_list(STRING),
        checkpoint=STRING,
        fingerprint=STRING,
        dim=COUNT,
        compression_ratio=COUNT,
        codec=STRING,
        num_passages=COUNT,
        num_states=COUNT,
        num_tokens=COUNT,
        num_truncated=COUNT,
        num_clipped=COUNT,
        size_bytes=COUNT,
        stores_text=FLAG,
    ),
    "Collections": _object(("object", "data"), object={"const": "list"}, data=_list(_ref("Collection"))),
    "Alias": _object(("alias", "collection"), object=STRING, alias=STRING, collection=STRING),
    "AliasDeleted": _object(("alias",), object=STRING, alias=STRING),
    "Aliases": _object(("object", "data"), object={"const": "list"}, data=_list(_ref("Alias"))),
    "SetAliasRequest": _object(("collection",), collection=STRING),
}
