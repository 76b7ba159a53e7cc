"""The container runtime interface of engines, as much of it as tests speak: unary gRPC calls over a Unix socket.

Messages are dictionaries from field number to value; the numbers are those of Kubernetes' cri-api `runtime/v1/api.proto`.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Union
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events

Value = Union[int, str, bytes, "Message", Mapping[str, str], Sequence["Value"]]
Message = Mapping[int, Value]


class CriError(Exception):
    """The runtime refused; `code` is gRPC's."""

    def __init__(self, method: str, code: int, words: str) -> None:
        self.code = code
        super().__init__(f"{method}: {words} (gRPC code {code})")


class Answer(dict[int, list[int | bytes]]):
    """A decoded message: all values of each field, in order."""

    @classmethod
    def parse(cls, data: bytes) -> "Answer":
        answer = cls()
        for number, value in _records(data):
            answer.setdefault(number, []).append(value)
        return answer

    def number(self, field: int) -> int:
        return next((value for value in self.get(field, ()) if isinstance(value, int)), 0)

    def text(self, field: int) -> str:
        return next(iter(self.texts(field)), "")

    def texts(self, field: int) -> list[str]:
        return [value.decode() for value in self.get(field, ()) if isinstance(value, bytes)]

    def messages(self, field: int) -> list["Answer"]:
        return [Answer.parse(value) for value in self.get(field, ()) if isinstance(value, bytes)]

    def message(self, field: int) -> "Answer":
        return next(iter(self.messages(field)), Answer())


async def call(path: Path, method: str, request: Message, *, within: float = 30.0) -> Answer:
    """`method` of the RuntimeService at the socket `path`. Raises CriError; OSError where nobody listens."""
    async with asyncio.timeout(within):
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            return await _exchange(reader, writer, method, encode(request))
        finally:
            writer.close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, body: bytes) -> Answer:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    head = {":method": "POST", ":scheme": "http", ":authority": "localhost", ":path": f"/runtime.v1.RuntimeService/{method}",
            "content-type": "application/grpc", "te": "trailers"}  # fmt: skip
    stream = connection.get_next_available_stream_id()
    connection.send_headers(stream, list(head.items()))
    connection.send_data(stream, b"\0" + len(body).to_bytes(4, "big") + body, end_stream=True)
    data, status = b"", {"grpc-status": "14", "grpc-message": "the connection ended"}
    ended = False
    while not ended:
        writer.write(connection.data_to_send())
        received = await reader.read(65536)
        if not received:
            break
        for event in connection.receive_data(received):
            match event:
                case h2.events.DataReceived():
                    data += event.data or b""
                    connection.acknowledge_received_data(event.flow_controlled_length or 0, stream)
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    status |= {_text(name): _text(value) for name, value in event.headers or ()}
                case h2.events.StreamEnded() | h2.events.StreamReset():
                    ended = True
    code = int(status["grpc-status"])
    if code:
        raise CriError(method, code, unquote(status["grpc-message"]))
    return Answer.parse(data[5:])


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


# --- protobuf -----------------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    return b"".join(_field(number, value) for number, value in message.items())


def _field(number: int, value: Value) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, str):
        return _field(number, value.encode())
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, Mapping):
        if all(isinstance(key, int) for key in value):
            return _field(number, encode(value))  # type: ignore[arg-type]
        return b"".join(_field(number, {1: str(key), 2: text}) for key, text in value.items())
    return b"".join(_field(number, item) for item in value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _records(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Of wire types 0 and 2: the messages read here have no others."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == 2:
            yield tag >> 3, data[at : at + value]
            at += value
        else:
            assert tag & 7 == 0, f"wire type {tag & 7}"
            yield tag >> 3, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
