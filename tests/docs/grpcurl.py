"""`grpcurl` as far as pages use it, for machines without it: `list`, and calls by the server's reflection."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-d", dest="data", default="{}")
    parser.add_argument("address")
    parser.add_argument("method")
    given = parser.parse_args()
    with grpc.insecure_channel(given.address) as channel:
        reflection = ProtoReflectionDescriptorDatabase(channel)
        said = (
            reflection.get_services() if given.method == "list" else call(channel, reflection, given.method, given.data)
        )
        for line in said:
            sys.stdout.write(f"{line}\n")


def call(channel: grpc.Channel, reflection: ProtoReflectionDescriptorDatabase, name: str, data: str) -> Iterable[str]:
    service, _, short = name.partition("/")
    method = DescriptorPool(reflection).FindServiceByName(service).FindMethodByName(short)
    request = json_format.Parse(data, GetMessageClass(method.input_type)())
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    send = getattr(channel, kind)(
        f"/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    answer = send(iter([request]) if method.client_streaming else request)
    return map(json_format.MessageToJson, answer if method.server_streaming else [answer])


if __name__ == "__main__":
    main()
