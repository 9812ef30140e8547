"""Every exception of the table reaches a caller with its status and details, and no other one's text does."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from token_swarm_server.rpc import errors

from token_swarm.errors import BadParameter, FailedPrecondition, UnknownName

CASES = [
    (BadParameter("sampling.top_p", 2, "above 0 and at most 1"), "INVALID_ARGUMENT", "sampling.top_p: 2 is not"),
    (UnknownName("expert", "x", ["b", "a"]), "NOT_FOUND", "no expert named 'x'; known: a, b"),
    (FailedPrecondition("other vocabulary"), "FAILED_PRECONDITION", "other vocabulary"),
    (errors.QueueFull("8 requests wait", 2.5), "RESOURCE_EXHAUSTED", "8 requests wait"),
    (errors.Unavailable("draining", 0.5), "UNAVAILABLE", "draining"),
    (errors.ExpertUnavailable("toy", "it died"), "UNAVAILABLE", "expert 'toy' is unavailable: it died"),
    (errors.TransportError("slot: 9"), "INVALID_ARGUMENT", "slot: 9"),
    (ValueError("a secret"), "INTERNAL", "internal error"),
]


@pytest.mark.parametrize(("exception", "code", "text"), CASES, ids=lambda case: type(case).__name__)
async def test_an_exception_reaches_the_caller_as_its_status(exception, code, text):
    async def fail(request, context):
        try:
            raise exception
        except Exception as caught:
            await errors.abort(context, caught)

    handlers = {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/Test/Fail")(b"")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        status = await rpc_status.aio.from_call(call)
    await server.stop(None)
    assert caught.value.code().name == code
    assert text in caught.value.details()
    assert "secret" not in caught.value.details()
    if isinstance(exception, BadParameter):
        details = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(details)
        assert [violation.field for violation in details.field_violations] == [exception.field]
    elif hasattr(exception, "retry_after"):
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToNanoseconds() == exception.retry_after * 1e9


def test_a_long_value_is_not_repeated_in_full():
    assert len(str(BadParameter("prompt", "x" * 10_000, "shorter"))) < 300
