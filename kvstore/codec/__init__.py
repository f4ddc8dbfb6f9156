"""How the bytes of a piece are stored (`kvstore.abc.Codec`); others are found by `kvstore.registry.codec_for`."""

from kvstore.codec.raw import RawCodec

__all__ = ["RawCodec"]
