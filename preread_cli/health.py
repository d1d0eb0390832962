"""`preread health`: is a server ready? For probes of containers; loads nothing but gRPC."""

from __future__ import annotations

from typing import Any

import click

from preread_cli.failures import UNAVAILABLE, CommandFailed
from preread_cli.options import address_option, client_options, option, tls_options


@click.command()
@option("--timeout-seconds", type=click.FloatRange(min=0, min_open=True), default=5.0, help="For the answer.")
@option(
    "--service",
    metavar="NAME",
    default="",
    help="What to ask about in place of readiness: live, for liveness probes, or encoder; a reranking server has both.",
)
@address_option
@tls_options
def command(**given: Any) -> None:
    """Ask a server, of either kind, whether it is ready.

    Exit codes: 0 ready, 2 no such service, 3 not ready or not there.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from preread.channel import check_address

    options = client_options(given)
    address = check_address("address", given["address"])
    arguments = options.channel_arguments(address)
    opened = (
        grpc.insecure_channel(address, arguments)
        if options.tls is None
        else grpc.secure_channel(address, options.tls.credentials(), arguments)
    )
    with opened as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=given["service"])
        try:
            answer = stub.Check(request, timeout=given["timeout_seconds"])
        except grpc.RpcError as exc:
            if exc.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            message = f"--service is {given['service']!r}, which {address} does not have; expected live, or encoder"
            raise CommandFailed(f"{message}, of a reranking server that has one") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise CommandFailed(f"{address} answers {status}", UNAVAILABLE)
    click.echo(f"{address} is {given['service'] or 'ready'}")
