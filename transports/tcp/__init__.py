"""TCP: an ordered byte stream per connection, paced on request."""

from transports.tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
