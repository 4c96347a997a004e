"""Fields of protobuf messages as bytes.

Serialised messages in a row are one message with the fields of all. So what is equal in every message of a caller
is serialised once, and large fields are put behind it without a copy into a message first.
"""

from __future__ import annotations

DELIMITED = 2  # wire type of bytes and messages


def varint(value: int) -> bytes:
    """Return a number above or equal to 0 as protobuf writes it."""
    if value < 0x80:
        return bytes((value,))
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def tag(number: int) -> bytes:
    """Return what precedes the length of field ``number``, if it holds bytes or a message."""
    return varint(number << 3 | DELIMITED)
